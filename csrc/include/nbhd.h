/* nbhd: neighborhood attention on CPUs, the C interface.
 *
 * One call is one struct passed by pointer. Its first field is its size: a caller built against a newer header, whose
 * struct is longer, is served if what this library does not know is zero; a shorter struct is refused. Every entry
 * point checks what it is given and answers with a status; none throws, aborts or keeps a pointer after it returns.
 *
 * Axes are always three, [Z, Y, X]; a 2D map has length 1 and kernel size 1 along Z, a sequence along Z and Y.
 */
#ifndef NBHD_H
#define NBHD_H

#include <stdint.h>

#if defined(_WIN32)
#if defined(NBHD_BUILD)
#define NBHD_API __declspec(dllexport)
#else
#define NBHD_API __declspec(dllimport)
#endif
#else
#define NBHD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define NBHD_ABI_VERSION 7

enum {
    NBHD_OK = 0,
    NBHD_BAD_STRUCT = 1, /* null, or a size this library does not know */
    NBHD_BAD_DTYPE = 2,
    NBHD_BAD_SHAPE = 3,    /* a length, head count or channel count out of range */
    NBHD_BAD_GEOMETRY = 4, /* an axis table with an interval outside the axis, or out of order */
    NBHD_BAD_POINTER = 5,  /* a required pointer is null or misaligned for its type */
    NBHD_OUT_OF_MEMORY = 6,
    NBHD_UNSUPPORTED = 7, /* no kernels for this machine or NBHD_CPU_ISA, or a field from the future is in use */
    NBHD_STALE_WEIGHT = 8 /* a packed weight is not, or not any more, that of its source */
};

enum { NBHD_FLOAT32 = 0, NBHD_BFLOAT16 = 1, NBHD_FLOAT16 = 2, NBHD_FLOAT64 = 3 };

/* Channels are contiguous; the other strides count elements, in the order batch, Z, Y, X, head. */
typedef struct nbhd_tensor {
    void *data;
    int64_t stride[5];
} nbhd_tensor;

/* Calls body(begin, end, context) on disjoint ranges that cover [begin, end): the signature of torch_parallel_for. */
typedef void (*nbhd_range_body)(int64_t begin, int64_t end, void *context);
typedef int32_t (*nbhd_parallel_for)(int64_t begin, int64_t end, int64_t grain, nbhd_range_body body, void *context);

/* One forward or backward pass. "real" below is double for NBHD_FLOAT64 and float for every other dtype. */
typedef struct nbhd_call {
    int64_t size;  /* sizeof(nbhd_call) of the caller */
    int64_t dtype; /* of query, key, value, out and their gradients */
    int64_t batch, heads, kv_heads, dim, dim_v;
    int64_t length[3], kernel_size[3], dilation[3];
    /* Per axis and position: the position of the first key, and how many keys follow it in steps of the dilation. */
    const int64_t *first[3], *count[3];
    double scale;
    nbhd_tensor query, key, value, out; /* out: written by the forward, not read by the backward */
    void *lse; /* real [batch, Z, Y, X, heads], dense; written by the forward (null: not), read by the backward */
    const void *rel_pos_bias; /* real [heads, 2 kz - 1, 2 ky - 1, 2 kx - 1], dense, or null */
    /* the backward only */
    nbhd_tensor d_out, d_query, d_key, d_value;
    const void *d_lse;    /* like lse, or null */
    void *d_rel_pos_bias; /* like rel_pos_bias, written; or null */
    /* threads: parallel_for of the host (null: threads of the library's own), at most `threads` at once */
    nbhd_parallel_for parallel_for;
    int64_t threads;
    /* the unfused pair only: [batch, Z, Y, X, heads, kz * ky * kx], a window's slots contiguous and row-major */
    nbhd_tensor weights, d_weights;
} nbhd_call;

/* Attention, and its gradients. */
NBHD_API int32_t nbhd_forward(const nbhd_call *call);
NBHD_API int32_t nbhd_backward(const nbhd_call *call);

/* Its two halves. Tensors that a half does not name are not looked at.
 *
 *   scores                 weights = scale Q K^T + rel_pos_bias, minus infinity in slots without a key
 *   scores_backward        d_query, d_key, d_rel_pos_bias from d_weights, query, key
 *   weighted_sum           out = weights V
 *   weighted_sum_backward  d_weights (zero in slots without a key), d_value from d_out, weights, value
 */
NBHD_API int32_t nbhd_scores(const nbhd_call *call);
NBHD_API int32_t nbhd_scores_backward(const nbhd_call *call);
NBHD_API int32_t nbhd_weighted_sum(const nbhd_call *call);
NBHD_API int32_t nbhd_weighted_sum_backward(const nbhd_call *call);

/* A linear layer. Its weight is packed in the order it is multiplied in, by the caller once or by each call for itself. */
typedef struct nbhd_weight {
    int64_t out; /* 0: there is no such layer */
    /* of the call's product_dtype, float32 [ceil(out / NBHD_PANEL)][in][NBHD_PANEL] or bfloat16
     * [ceil(out / NBHD_PANEL)][ceil(in / 2)][NBHD_PANEL][2], with zeros past the last output and input; null: the call packs
     * `source` */
    const void *panels;
    /* of the call's parameter_dtype */
    const void *
        source; /* [out][in], dense; beside `panels` it is what they were made of, some of its numbers are compared, or null */
    const void *bias; /* [out], or null */
} nbhd_weight;

#define NBHD_PANEL 32
#define NBHD_LAYERS 3

/* Linear layers over rows, and what stands around them in a transformer. Rows are of `dtype` and what is learned is of
 * `parameter_dtype`, each of them float32, bfloat16 or float16. It is computed in float32 and rounded where it is written; with
 * bfloat16 for `product_dtype` what a layer multiplies, its input and its weight, is rounded to that before, and the products are
 * exact; bfloat16 numbers below a float's smallest normal one are nothing then. Columns are contiguous; outputs share no memory
 * with anything else. */
typedef struct nbhd_linear_call {
    int64_t size; /* sizeof(nbhd_linear_call) of the caller */
    int64_t dtype, parameter_dtype;
    int64_t product_dtype; /* float32; or bfloat16, where nbhd_isa() is "avx512bf16" */
    int64_t rows, in;
    const void *input;    /* [rows][in] of dtype; so are residual and output */
    int64_t input_stride; /* from row to row, in elements, at least the number of columns; so are the others */
    int64_t
        norm; /* 1: layer norm of the input's rows, with norm_weight and norm_bias, [in] of parameter_dtype, or null; 0: none */
    const void *norm_weight, *norm_bias;
    double norm_epsilon;
    nbhd_weight hidden; /* a layer and the exact GELU before the last layer */
    nbhd_weight last
        [NBHD_LAYERS]; /* up to three of the same input, such as query, key and value; those without outputs come last */
    /* with one last layer only */
    int64_t gelu;       /* 1: the exact GELU after the last layer; 0: none */
    const float *scale; /* [out], or null */
    const void *residual;
    int64_t residual_stride;
    void *output[NBHD_LAYERS]; /* [rows][out] of each */
    int64_t output_stride[NBHD_LAYERS];
    /* for the gradients, or null */
    float *moments; /* [rows][2]: mean and 1 / sqrt(variance + norm_epsilon) */
    float *sums;    /* [rows][hidden.out]: what GELU is taken of */
    nbhd_parallel_for parallel_for;
    int64_t threads;
} nbhd_linear_call;

/* output = residual + scale * gelu(last(gelu(hidden(norm(input))))), with those parts that are there. */
NBHD_API int32_t nbhd_linear(const nbhd_linear_call *call);

/* Gradients of output[i] = factor * last[i](gelu(hidden(norm(input)))). Tensors are dense. The input, gradients of it
 * and of outputs, and what is added are of `dtype`, everything else is float32. Of a weight it is `source` that is read. What is
 * asked of parts that are not there is not written. With bfloat16 for `product_dtype` what is multiplied is rounded to that
 * before: gradients of outputs (times the factor where they are multiplied by what a layer takes) and of the hidden layer, what a
 * layer takes, and weights (times the factor where that is not 1). */
typedef struct nbhd_linear_gradients_call {
    int64_t size;                 /* sizeof(nbhd_linear_gradients_call) of the caller */
    int64_t dtype, product_dtype; /* as of nbhd_linear_call */
    int64_t rows, in;
    const void *input; /* [rows][in] */
    int64_t norm;
    const float *norm_weight, *norm_bias;
    nbhd_weight hidden;
    nbhd_weight last[NBHD_LAYERS];
    const float *moments, *sums; /* as nbhd_linear wrote them */
    double factor;
    const void *d_output[NBHD_LAYERS]; /* [rows][out] of each */
    const void *added;                 /* [rows][in], added to d_input; or null */
    /* what is wanted, each like what it is the gradient of; null: not this one */
    void *d_input;
    float *d_norm_weight, *d_norm_bias;
    float *d_hidden_weight, *d_hidden_bias;
    float *d_weight[NBHD_LAYERS], *d_bias[NBHD_LAYERS];
    nbhd_parallel_for parallel_for;
    int64_t threads;
} nbhd_linear_gradients_call;

NBHD_API int32_t nbhd_linear_gradients(const nbhd_linear_gradients_call *call);

NBHD_API int32_t nbhd_abi_version(void);
NBHD_API const char *
nbhd_isa(void); /* the instruction set in use: "avx512bf16", "avx512", "avx2", "baseline", "neon" or "none" */
NBHD_API const char *nbhd_status_text(int32_t status);

#ifdef __cplusplus
}
#endif
#endif
