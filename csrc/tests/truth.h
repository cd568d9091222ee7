// Neighborhood attention as plain loops in double, written from the definition: what the library is held to.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../include/nbhd.h"

namespace truth {

struct Axis {
    int64_t length = 1, kernel = 1, stride = 1, dilation = 1;
    bool causal = false;

    // First key position and number of keys of position i; keys follow in steps of the dilation.
    void window(int64_t i, int64_t &first, int64_t &count) const {
        const int64_t g = i % dilation, u = i / dilation, places = (length - g + dilation - 1) / dilation;
        int64_t w;
        if (causal) {
            const int64_t leader = std::min(u / stride * stride + stride - 1, places - 1);
            w = std::max<int64_t>(leader - kernel + 1, 0);
            count = u - w + 1;
        } else {
            const int64_t leader = std::min(u / stride * stride + stride / 2, places - 1);
            w = std::clamp<int64_t>(leader - kernel / 2, 0, places - kernel);
            count = kernel;
        }
        first = g + w * dilation;
    }
};

// Tensors are dense doubles [batch, Z, Y, X, heads, channels].
struct Case {
    Axis axis[3];
    int64_t batch = 1, heads = 1, kv_heads = 1, dim = 1, dim_v = 1;
    double scale = 1;
    bool bias = false, d_lse = false;

    int64_t positions() const { return axis[0].length * axis[1].length * axis[2].length; }
    int64_t bias_size() const {
        return heads * (2 * axis[0].kernel - 1) * (2 * axis[1].kernel - 1) * (2 * axis[2].kernel - 1);
    }
};

struct Tensors {
    std::vector<double> query, key, value, bias, out, lse, d_out, d_lse, d_query, d_key, d_value, d_bias;
};

// Visits every key of query (z, y, x): visit(key position, index into one head's bias table).
template <class Visit>
void for_each_key(const Case &c, const int64_t *at, Visit visit) {
    int64_t first[3], count[3];
    for (int a = 0; a < 3; a++) c.axis[a].window(at[a], first[a], count[a]);
    const auto relative = [&](int a, int64_t key) {
        return (key / c.axis[a].dilation) - at[a] / c.axis[a].dilation + c.axis[a].kernel - 1;
    };
    for (int64_t i = 0; i < count[0]; i++)
        for (int64_t j = 0; j < count[1]; j++)
            for (int64_t k = 0; k < count[2]; k++) {
                const int64_t z = first[0] + i * c.axis[0].dilation, y = first[1] + j * c.axis[1].dilation,
                              x = first[2] + k * c.axis[2].dilation;
                visit((z * c.axis[1].length + y) * c.axis[2].length + x,
                      (relative(0, z) * (2 * c.axis[1].kernel - 1) + relative(1, y)) * (2 * c.axis[2].kernel - 1) +
                          relative(2, x));
            }
}

// Fills out, lse and the gradients from the rest.
inline void run(const Case &c, Tensors &t) {
    const int64_t n = c.positions(), table = c.bias_size() / c.heads;
    t.out.assign(c.batch * n * c.heads * c.dim_v, 0), t.lse.assign(c.batch * n * c.heads, 0);
    t.d_query.assign(t.query.size(), 0), t.d_key.assign(t.key.size(), 0), t.d_value.assign(t.value.size(), 0);
    t.d_bias.assign(c.bias ? c.bias_size() : 0, 0);
    std::vector<double> s;
    std::vector<int64_t> keys, places;
    for (int64_t b = 0; b < c.batch; b++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t at[3] = {i / (c.axis[1].length * c.axis[2].length), i / c.axis[2].length % c.axis[1].length,
                                   i % c.axis[2].length};
            keys.clear(), places.clear();
            for_each_key(c, at, [&](int64_t key, int64_t place) { keys.push_back(key), places.push_back(place); });
            for (int64_t h = 0; h < c.heads; h++) {
                const int64_t kv = h / (c.heads / c.kv_heads), q_at = (b * n + i) * c.heads + h;
                const double *q = &t.query[q_at * c.dim], *g = &t.d_out[q_at * c.dim_v];
                const auto kv_at = [&](size_t j) { return (b * n + keys[j]) * c.kv_heads + kv; };
                s.assign(keys.size(), 0);
                double most = -INFINITY, sum = 0, delta = 0;
                for (size_t j = 0; j < keys.size(); j++) {
                    for (int64_t e = 0; e < c.dim; e++) s[j] += q[e] * t.key[kv_at(j) * c.dim + e];
                    s[j] = s[j] * c.scale + (c.bias ? t.bias[h * table + places[j]] : 0);
                    most = std::max(most, s[j]);
                }
                for (double x : s) sum += std::exp(x - most);
                t.lse[q_at] = most + std::log(sum);
                std::vector<double> dp(keys.size());
                for (size_t j = 0; j < keys.size(); j++) {
                    const double *v = &t.value[kv_at(j) * c.dim_v];
                    double *dv = &t.d_value[kv_at(j) * c.dim_v];
                    s[j] = std::exp(s[j] - t.lse[q_at]);
                    for (int64_t e = 0; e < c.dim_v; e++)
                        t.out[q_at * c.dim_v + e] += s[j] * v[e], dp[j] += g[e] * v[e], dv[e] += s[j] * g[e];
                    delta += s[j] * dp[j];
                }
                for (size_t j = 0; j < keys.size(); j++) {
                    const double ds = s[j] * (dp[j] - delta + (c.d_lse ? t.d_lse[q_at] : 0));
                    for (int64_t e = 0; e < c.dim; e++) {
                        t.d_query[q_at * c.dim + e] += c.scale * ds * t.key[kv_at(j) * c.dim + e];
                        t.d_key[kv_at(j) * c.dim + e] += c.scale * ds * q[e];
                    }
                    if (c.bias) t.d_bias[h * table + places[j]] += ds;
                }
            }
        }
}

// The unfused pair. Given: query, key, value, bias and d_out of the tensors, `weights` and `d_scores` here.
struct Pair {
    std::vector<double> weights, d_scores;              // [batch, Z, Y, X, heads, slots]
    std::vector<double> scores, d_query, d_key, d_bias; // of the first half
    std::vector<double> out, d_weights, d_value;        // of the second
};

inline void run_pair(const Case &c, const Tensors &t, Pair &p) {
    const int64_t n = c.positions(), table = c.bias_size() / c.heads,
                  slots = c.axis[0].kernel * c.axis[1].kernel * c.axis[2].kernel;
    p.scores.assign(size_t(c.batch * n * c.heads * slots), -INFINITY), p.d_weights.assign(p.scores.size(), 0);
    p.d_query.assign(t.query.size(), 0), p.d_key.assign(t.key.size(), 0), p.d_bias.assign(t.bias.size(), 0);
    p.out.assign(size_t(c.batch * n * c.heads * c.dim_v), 0), p.d_value.assign(t.value.size(), 0);
    for (int64_t b = 0; b < c.batch; b++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t at[3] = {i / (c.axis[1].length * c.axis[2].length), i / c.axis[2].length % c.axis[1].length,
                                   i % c.axis[2].length};
            int64_t first[3], count[3], seen = 0;
            for (int a = 0; a < 3; a++) c.axis[a].window(at[a], first[a], count[a]);
            for_each_key(c, at, [&](int64_t key, int64_t place) {
                const int64_t x = seen % count[2], y = seen / count[2] % count[1], z = seen++ / count[2] / count[1];
                const int64_t slot = (z * c.axis[1].kernel + y) * c.axis[2].kernel + x;
                for (int64_t h = 0; h < c.heads; h++) {
                    const int64_t q = (b * n + i) * c.heads + h, w = q * slots + slot;
                    const int64_t kv = (b * n + key) * c.kv_heads + h / (c.heads / c.kv_heads);
                    double score = 0;
                    for (int64_t e = 0; e < c.dim; e++) {
                        score += t.query[q * c.dim + e] * t.key[kv * c.dim + e];
                        p.d_query[q * c.dim + e] += c.scale * p.d_scores[w] * t.key[kv * c.dim + e];
                        p.d_key[kv * c.dim + e] += c.scale * p.d_scores[w] * t.query[q * c.dim + e];
                    }
                    p.scores[w] = c.scale * score + (c.bias ? t.bias[h * table + place] : 0);
                    if (c.bias) p.d_bias[h * table + place] += p.d_scores[w];
                    for (int64_t e = 0; e < c.dim_v; e++) {
                        p.out[q * c.dim_v + e] += p.weights[w] * t.value[kv * c.dim_v + e];
                        p.d_weights[w] += t.d_out[q * c.dim_v + e] * t.value[kv * c.dim_v + e];
                        p.d_value[kv * c.dim_v + e] += p.weights[w] * t.d_out[q * c.dim_v + e];
                    }
                }
            });
        }
}

} // namespace truth
