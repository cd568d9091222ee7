// Arguments no caller should pass: each is answered with a status, none crashes, none writes.
#include <cstdio>
#include <functional>

#include "call.h"

namespace {

int failures = 0;

void expect(int32_t got, int32_t wanted, const char *what) {
    if (got == wanted) return;
    printf("%s: status %d (%s), expected %d\n", what, got, nbhd_status_text(got), wanted);
    failures++;
}

truth::Case small() {
    truth::Case c;
    c.axis[1].length = 9, c.axis[1].kernel = 3, c.axis[2].length = 11, c.axis[2].kernel = 3, c.axis[2].dilation = 2;
    c.heads = 4, c.kv_heads = 2, c.dim = 8, c.dim_v = 5, c.bias = true, c.d_lse = true;
    return c;
}

// Both passes with one thing changed.
void refuse(int32_t wanted, const char *what, const std::function<void(Prepared &)> &change,
            bool backward_only = false) {
    std::mt19937_64 random(1);
    Prepared p;
    p.make(small(), NBHD_FLOAT32, random);
    change(p);
    if (!backward_only) expect(nbhd_forward(&p.call), wanted, what);
    expect(nbhd_backward(&p.call), wanted, what);
    for (double x : p.d_key.values(4))
        if (x == x) printf("%s: wrote all the same\n", what), failures++;
}

} // namespace

int main() {
    expect(nbhd_forward(nullptr), NBHD_BAD_STRUCT, "null");
    expect(nbhd_backward(nullptr), NBHD_BAD_STRUCT, "null");
    const int64_t huge = INT64_MAX, least = INT64_MIN;
    for (int64_t size : {int64_t(0), int64_t(8), int64_t(sizeof(nbhd_call)) - 8, least, huge})
        refuse(NBHD_BAD_STRUCT, "size", [=](Prepared &p) { p.call.size = size; });
    for (int64_t dtype : {int64_t(-1), int64_t(4), huge})
        refuse(NBHD_BAD_DTYPE, "dtype", [=](Prepared &p) { p.call.dtype = dtype; });
    for (int64_t n : {int64_t(0), int64_t(-1), least, huge}) {
        refuse(NBHD_BAD_SHAPE, "heads", [=](Prepared &p) { p.call.heads = n; });
        refuse(NBHD_BAD_SHAPE, "kv_heads", [=](Prepared &p) { p.call.kv_heads = n; });
        refuse(NBHD_BAD_SHAPE, "dim", [=](Prepared &p) { p.call.dim = n; });
        refuse(NBHD_BAD_SHAPE, "dim_v", [=](Prepared &p) { p.call.dim_v = n; });
        for (int a = 0; a < 3; a++) {
            refuse(NBHD_BAD_SHAPE, "length", [=](Prepared &p) { p.call.length[a] = n; });
            refuse(n > 0 ? NBHD_BAD_GEOMETRY : NBHD_BAD_SHAPE, "kernel_size",
                   [=](Prepared &p) { p.call.kernel_size[a] = n; });
            refuse(n > 0 ? NBHD_BAD_GEOMETRY : NBHD_BAD_SHAPE, "dilation",
                   [=](Prepared &p) { p.call.dilation[a] = n; });
        }
    }
    refuse(NBHD_BAD_SHAPE, "batch", [=](Prepared &p) { p.call.batch = -1; });
    refuse(NBHD_BAD_SHAPE, "batch", [=](Prepared &p) { p.call.batch = huge; });
    refuse(NBHD_BAD_SHAPE, "heads not a multiple of kv_heads", [](Prepared &p) { p.call.kv_heads = 3; });
    refuse(NBHD_BAD_SHAPE, "scale NaN", [](Prepared &p) { p.call.scale = NAN; });
    refuse(NBHD_BAD_SHAPE, "scale infinite", [](Prepared &p) { p.call.scale = INFINITY; });
    refuse(NBHD_BAD_SHAPE, "more elements than an address space", [](Prepared &p) {
        for (int a = 0; a < 3; a++)
            p.call.length[a] = int64_t(1) << 30, p.call.kernel_size[a] = 1, p.call.dilation[a] = 1;
    });
    for (int a = 0; a < 3; a++) {
        refuse(NBHD_BAD_POINTER, "no table", [=](Prepared &p) { p.call.first[a] = nullptr; });
        refuse(NBHD_BAD_POINTER, "no table", [=](Prepared &p) { p.call.count[a] = nullptr; });
    }
    for (int64_t value : {int64_t(-1), int64_t(1), int64_t(9), int64_t(11), huge, least}) {
        refuse(NBHD_BAD_GEOMETRY, "first key", [=](Prepared &p) { p.first[2][4] = value; });
        refuse(NBHD_BAD_GEOMETRY, "key count", [=](Prepared &p) { p.count[2][4] = value == 1 ? 0 : value; });
    }
    refuse(NBHD_BAD_GEOMETRY, "windows that go back", [](Prepared &p) { std::swap(p.first[1][2], p.first[1][6]); });
    refuse(NBHD_BAD_GEOMETRY, "a key nobody sees", [](Prepared &p) { p.count[1][8] = 2, p.count[1][7] = 2; });
    refuse(NBHD_BAD_GEOMETRY, "a bias out of its table", [](Prepared &p) {
        p.call.kernel_size[1] = 5, p.call.length[1] = 9; // windows of 3 far behind the query
        for (int64_t i = 0; i < 9; i++) p.first[1][size_t(i)] = 0, p.count[1][size_t(i)] = i < 8 ? 1 : 9;
    });
    const auto tensors = {&nbhd_call::query, &nbhd_call::key, &nbhd_call::value};
    for (auto tensor : tensors) {
        refuse(NBHD_BAD_POINTER, "null tensor", [=](Prepared &p) { (p.call.*tensor).data = nullptr; });
        refuse(NBHD_BAD_POINTER, "misaligned tensor",
               [=](Prepared &p) { (p.call.*tensor).data = (char *)(p.call.*tensor).data + 1; });
    }
    for (auto tensor : {&nbhd_call::d_out, &nbhd_call::d_query, &nbhd_call::d_key, &nbhd_call::d_value})
        refuse(NBHD_BAD_POINTER, "null gradient", [=](Prepared &p) { (p.call.*tensor).data = nullptr; }, true);
    refuse(NBHD_BAD_POINTER, "null lse", [](Prepared &p) { p.call.lse = nullptr; }, true); // the forward may do without
    refuse(NBHD_BAD_POINTER, "misaligned bias",
           [](Prepared &p) { p.call.rel_pos_bias = (const char *)p.call.rel_pos_bias + 2; });
    refuse(NBHD_BAD_POINTER, "bias gradient without bias", [](Prepared &p) { p.call.rel_pos_bias = nullptr; }, true);

    // the halves look at their own tensors alone, and need them
    for (const auto entry : {nbhd_scores, nbhd_scores_backward, nbhd_weighted_sum, nbhd_weighted_sum_backward}) {
        expect(entry(nullptr), NBHD_BAD_STRUCT, "null");
        const bool scores = entry == nbhd_scores || entry == nbhd_scores_backward;
        for (auto tensor : {scores ? &nbhd_call::key : &nbhd_call::value,
                            entry == nbhd_scores_backward ? &nbhd_call::d_weights : &nbhd_call::weights}) {
            std::mt19937_64 random(1);
            Prepared p;
            p.make(small(), NBHD_FLOAT32, random);
            (p.call.*tensor).data = nullptr;
            expect(entry(&p.call), NBHD_BAD_POINTER, "a half without its tensor");
        }
    }
    // accepted: a larger struct whose unknown fields are zero, no image at all, a mad thread count, a host that does nothing
    std::mt19937_64 random(1);
    Prepared p;
    p.make(small(), NBHD_FLOAT32, random);
    struct {
        nbhd_call call;
        int64_t future[2];
    } later{p.call, {0, 0}};
    later.call.size = sizeof later;
    expect(nbhd_forward(&later.call), NBHD_OK, "a newer caller");
    later.future[1] = 1;
    expect(nbhd_forward(&later.call), NBHD_UNSUPPORTED, "a newer caller that wants something new");
    p.call.threads = huge;
    expect(nbhd_forward(&p.call), NBHD_OK, "threads");
    p.call.threads = -5;
    p.call.parallel_for = [](int64_t, int64_t, int64_t, nbhd_range_body, void *) -> int32_t { return 0; };
    expect(nbhd_backward(&p.call), NBHD_OK, "threads");
    p.call.batch = 0, p.call.query.data = nullptr;
    expect(nbhd_backward(&p.call), NBHD_OK, "no images");
    for (double x : p.reals(p.d_bias))
        if (x != 0) printf("the bias gradient of no images is not zero\n"), failures++;
    for (int32_t s = -2; s < 12; s++)
        if (!nbhd_status_text(s)) failures++;
    if (!failures) printf("ok\n");
    return failures != 0;
}
