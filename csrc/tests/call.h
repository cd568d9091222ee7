// Runs the library on a truth::Case: tensors of any dtype in odd layouts, outputs poisoned with NaN.
#pragma once
#include <cstring>
#include <random>

#include "elements.h"
#include "truth.h"

// A tensor in memory of its own, exactly as large as its layout needs: what lies beyond is the sanitizer's to find.
struct Stored {
    std::vector<unsigned char> memory;
    nbhd_tensor view{};
    int64_t shape[6] = {}, dtype = 0;

    // layout 0: dense heads-last; 1: heads first; 2: heads-last with gaps after every token's head
    void make(const truth::Case &c, int64_t heads, int64_t channels, int64_t type, int layout) {
        const int64_t s[6] = {c.batch, c.axis[0].length, c.axis[1].length, c.axis[2].length, heads, channels};
        std::copy(s, s + 6, shape);
        dtype = type;
        const int heads_last[5] = {4, 3, 2, 1, 0}, heads_first[5] = {3, 2, 1, 4, 0};
        int64_t step = channels + (layout == 2 ? 3 : 0), last = channels;
        for (int i = 0; i < 5; i++) {
            const int axis = layout == 1 ? heads_first[i] : heads_last[i];
            view.stride[axis] = step;
            last += (shape[axis] - 1) * step;
            step *= shape[axis];
        }
        memory.assign(size_t(last) * element_size(dtype), 0xff); // NaN in every dtype
        view.data = memory.data();
    }
    void *at(int64_t i) const { // i counts as in a dense heads-last tensor
        int64_t offset = i % shape[5];
        i /= shape[5];
        for (int axis = 4; axis >= 0; i /= shape[axis--]) offset += i % shape[axis] * view.stride[axis];
        return (unsigned char *)view.data + offset * int64_t(element_size(dtype));
    }
    void set(std::vector<double> &x) { // rounds x to what is stored
        for (size_t i = 0; i < x.size(); i++) put(at(int64_t(i)), dtype, x[i]), x[i] = get(at(int64_t(i)), dtype);
    }
    // Whether what lies between its numbers is as it was made.
    bool gaps_are_untouched() const {
        std::vector<bool> is_number(memory.size());
        int64_t n = 1;
        for (int64_t length : shape) n *= length;
        for (int64_t i = 0; i < n; i++) {
            const size_t first = size_t((unsigned char *)at(i) - memory.data());
            std::fill_n(is_number.begin() + int64_t(first), element_size(dtype), true);
        }
        for (size_t i = 0; i < memory.size(); i++)
            if (!is_number[i] && memory[i] != 0xff) return false;
        return true;
    }
    std::vector<double> values(size_t n) const {
        std::vector<double> x(n);
        for (size_t i = 0; i < n; i++) x[i] = get(at(int64_t(i)), dtype);
        return x;
    }
};

struct Prepared {
    truth::Case c;
    truth::Tensors t;
    int64_t dtype, real;
    truth::Pair pair;
    Stored query, key, value, out, d_out, d_query, d_key, d_value, weights, d_weights;
    std::vector<unsigned char> lse, d_lse, bias, d_bias;
    std::vector<int64_t> first[3], count[3];
    nbhd_call call{};

    static std::vector<unsigned char> stored(std::vector<double> &x, int64_t type) {
        std::vector<unsigned char> m(x.size() * element_size(type));
        for (size_t i = 0; i < x.size(); i++)
            put(&m[i * element_size(type)], type, x[i]), x[i] = get(&m[i * element_size(type)], type);
        return m;
    }

    template <class Random>
    void make(const truth::Case &which, int64_t type, Random &random) {
        c = which, dtype = type, real = type == NBHD_FLOAT64 ? NBHD_FLOAT64 : NBHD_FLOAT32;
        std::normal_distribution<double> normal;
        const auto fill = [&](std::vector<double> &x, int64_t n) {
            x.resize(size_t(n));
            for (double &v : x) v = normal(random);
        };
        const int64_t n = c.batch * c.positions();
        fill(t.query, n * c.heads * c.dim), fill(t.key, n * c.kv_heads * c.dim),
            fill(t.value, n * c.kv_heads * c.dim_v);
        fill(t.d_out, n * c.heads * c.dim_v), fill(t.d_lse, n * c.heads), fill(t.bias, c.bias ? c.bias_size() : 0);
        const auto layout = [&] { return int(random() % 3); };
        query.make(c, c.heads, c.dim, dtype, layout()), key.make(c, c.kv_heads, c.dim, dtype, layout());
        value.make(c, c.kv_heads, c.dim_v, dtype, layout()), d_out.make(c, c.heads, c.dim_v, dtype, layout());
        out.make(c, c.heads, c.dim_v, dtype, layout()), d_query.make(c, c.heads, c.dim, dtype, layout());
        d_key.make(c, c.kv_heads, c.dim, dtype, layout()), d_value.make(c, c.kv_heads, c.dim_v, dtype, layout());
        query.set(t.query), key.set(t.key), value.set(t.value), d_out.set(t.d_out);
        const int64_t slots = c.axis[0].kernel * c.axis[1].kernel * c.axis[2].kernel;
        fill(pair.weights, n * c.heads * slots), fill(pair.d_scores, n * c.heads * slots);
        weights.make(c, c.heads, slots, dtype, layout()), d_weights.make(c, c.heads, slots, dtype, layout());
        d_lse = stored(t.d_lse, real), bias = stored(t.bias, real);
        lse.assign(size_t(n * c.heads) * element_size(real), 0xff), d_bias.assign(bias.size(), 0xff);
        call.size = sizeof call, call.dtype = dtype, call.batch = c.batch, call.heads = c.heads,
        call.kv_heads = c.kv_heads;
        call.dim = c.dim, call.dim_v = c.dim_v, call.scale = c.scale, call.threads = 1;
        for (int a = 0; a < 3; a++) {
            call.length[a] = c.axis[a].length, call.kernel_size[a] = c.axis[a].kernel,
            call.dilation[a] = c.axis[a].dilation;
            first[a].resize(size_t(c.axis[a].length)), count[a].resize(size_t(c.axis[a].length));
            for (int64_t i = 0; i < c.axis[a].length; i++)
                c.axis[a].window(i, first[a][size_t(i)], count[a][size_t(i)]);
            call.first[a] = first[a].data(), call.count[a] = count[a].data();
        }
        call.query = query.view, call.key = key.view, call.value = value.view, call.out = out.view,
        call.d_out = d_out.view;
        call.weights = weights.view, call.d_weights = d_weights.view;
        call.d_query = d_query.view, call.d_key = d_key.view, call.d_value = d_value.view;
        call.lse = lse.data(), call.d_lse = c.d_lse ? d_lse.data() : nullptr;
        call.rel_pos_bias = c.bias ? bias.data() : nullptr, call.d_rel_pos_bias = c.bias ? d_bias.data() : nullptr;
    }
    // A copy's call still points to what it was copied from.
    void point_to_own_memory() {
        call.query.data = query.memory.data(), call.key.data = key.memory.data(), call.value.data = value.memory.data();
        call.out.data = out.memory.data(), call.d_out.data = d_out.memory.data();
        call.d_query.data = d_query.memory.data(), call.d_key.data = d_key.memory.data();
        call.d_value.data = d_value.memory.data(), call.lse = lse.data();
        call.weights.data = weights.memory.data(), call.d_weights.data = d_weights.memory.data();
        if (call.d_rel_pos_bias) call.d_rel_pos_bias = d_bias.data();
    }
    bool gaps_are_untouched() const {
        for (const Stored *t : {&out, &d_query, &d_key, &d_value, &d_weights})
            if (!t->gaps_are_untouched()) return false;
        return true;
    }
    std::vector<double> reals(const std::vector<unsigned char> &m) const {
        std::vector<double> x(m.size() / element_size(real));
        for (size_t i = 0; i < x.size(); i++) x[i] = get(&m[i * element_size(real)], real);
        return x;
    }
};
