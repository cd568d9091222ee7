// Asking for memory ahead of its use: what the next row tile will read (its queries and, where the ring moves along Y, its new
// keys) and write is asked for while this one is computed, a few lines between some products and the next. A processor has some
// two dozen lines under way at a time: a Zen 4 waited for a fifth of its forward where it was asked for 26 at a time.
//
// There are as many lines as groups of products, so asking must be cheap: line by line, from a counter for each, it was a fifth of a
// Zen 5's forward with window 3, nearly all of it the counting.
#pragma once
#include "../problem.h"
#include "view.h"

namespace nbhd::NBHD_ISA {

// Asked for are eight lines at a time, four pairs, of one token or of neighbours. The last of a row may overlap others.
struct Ahead {
    static constexpr int most_rows = 64, few_lines = 8, line = 64;
    struct Row {
        uintptr_t at, last;    // addresses: of the lines to ask for next; where the last begin
        uintptr_t step;        // to the next
        uintptr_t pair, other; // from a pair to the next, and from a line to the other of its pair
    } row[most_rows];
    int rows = 0, lines = 0, at = 0, per_step = 0, due = 0;

    // Tokens [x, x_end) of the query rows (keys: rows along Y) [y, y_end); of two heads in the lanes only if they lie side by side.
    template <class T>
    void add(const View<T> &v, int z, int y, int y_end, int x, int x_end, int head, int channels, int heads) {
        if (!v.data || x >= x_end) return;
        if (v.head == channels) channels *= heads;
        const int of_token = (channels * (int)sizeof(T) + line - 1) / line, n = x_end - x;
        const uintptr_t token = uintptr_t(v.x * (int64_t)sizeof(T));
        for (int done = 0, some = few_lines; done < of_token; done += some) {
            while (some > of_token - done) some /= 2; // a power of two of a token's lines
            const int tokens = few_lines / some, before_last = n > tokens ? n - tokens : 0;
            Row r;
            r.step = uintptr_t(tokens) * token;
            r.pair = some == 1 ? 2 * token : some == 2 ? token : some == 4 ? line : 2 * line;
            r.other = some == 1 || some == 4 ? token : line;
            for (int u = y; u < y_end && rows < most_rows; u++, lines += n * some) {
                r.at = uintptr_t(v.at(z, u, x, head)) + uintptr_t(done * line),
                r.last = r.at + uintptr_t(before_last) * token;
                row[rows++] = r;
            }
        }
    }
    // About how many steps there will be; what they leave, `finish` asks for.
    void share_among(int steps) { per_step = steps > 0 ? (lines + steps - 1) / steps : 0; }
    NBHD_INLINE_MEMBER void step() {
        if ((due += per_step) > 0) ask();
    }
    void finish() { due = 1 << 30, ask(); }

  private:
    // Inside of loops that hold sums in all vector registers, which a call would have to save. Nor are the requests a function of their
    // own: GCC may drop calls of one that does nothing else.
    NBHD_INLINE_MEMBER void ask() {
        for (; due > 0 && at < rows; due -= few_lines) {
            Row &r = row[at];
            uintptr_t a = r.at;
            r.at += r.step;
            if (a >= r.last) a = r.last, at++;
            const uintptr_t pair = r.pair, other = r.other;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, a += pair)
                __builtin_prefetch((const char *)a, 0, 2), __builtin_prefetch((const char *)(a + other), 0, 2);
        }
    }
};

} // namespace nbhd::NBHD_ISA
