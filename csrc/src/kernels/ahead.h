// Asking for memory ahead of its use: what the next row tile will read (its queries and, where the ring moves along Y, its new
// keys) and write is asked for while this one is computed, a few lines between some products and the next. A processor has some
// two dozen lines under way at a time: a Zen 4 waited for a fifth of its forward where it was asked for 26 at a time.
//
// In the forward with vectors of 64 bytes only on AMD's processors, for more than 4 MB of tensors. An Intel server took 2 to 14 % longer
// in the forward, asked for many lines at a time (the backward neither gained nor lost); a few at a time it has not been measured.
#pragma once
#include "../problem.h"
#include "view.h"

namespace nbhd::NBHD_ISA {

static bool forward_asks_ahead(const Problem &p) { return !p.small && (NBHD_VECTOR_BYTES < 64 || p.far); }

struct Ahead {
    static constexpr int most_rows = 64;
    struct Row {
        const char *token;
        int64_t stride;
        int tokens, bytes;
    } row[most_rows];
    int rows = 0, lines = 0, at_row = 0, at_token = 0, at_byte = 0, per_step = 0;

    // Tokens [x, x_end) of the query rows (keys: rows along Y) [y, y_end); of two heads in the lanes only if they lie side by side.
    template <class T>
    void add(const View<T> &v, int z, int y, int y_end, int x, int x_end, int head, int channels, int heads) {
        if (!v.data || x >= x_end) return;
        if (v.head == channels) channels *= heads;
        const int bytes = channels * (int)sizeof(T), tokens = x_end - x;
        for (; y < y_end && rows < most_rows; y++, lines += tokens * ((bytes + 63) / 64))
            row[rows++] = Row{(const char *)v.at(z, y, x, head), v.x * (int64_t)sizeof(T), tokens, bytes};
    }
    // About how many steps there will be; what they leave, `finish` asks for.
    void share_among(int steps) { per_step = steps > 0 ? (lines + steps - 1) / steps : 0; }
    void step() { ask(per_step); }
    void finish() { ask(lines); }

  private:
    void ask(int n) {
        for (; n > 0 && at_row < rows; n--) {
            const Row &r = row[at_row];
            __builtin_prefetch(r.token + at_token * r.stride + at_byte, 0, 2);
            if ((at_byte += 64) < r.bytes) continue;
            at_byte = 0;
            if (++at_token == r.tokens) at_token = 0, at_row++;
        }
    }
};

} // namespace nbhd::NBHD_ISA
