// The weights of the unfused pair between memory, [query][slot] with slots row-major over the window, and a tile's scores,
// [slot][lane] with the slots in the kernels' order.
#pragma once
#include "pack.h"
#include "tile.h"

namespace nbhd::NBHD_ISA {

// For each slot of memory where the kernels have it.
static void fill_slot_order(const Problem &p, int *order) {
    const int kz = p.axis[0].kernel, ky = p.axis[1].kernel, kx = p.axis[2].kernel;
    for (int z = 0; z < kz; z++)
        for (int y = 0; y < ky; y++)
            for (int x = 0; x < kx; x++) *order++ = ((z * kx + x) * ky + y) * lanes;
}

// Query row r of a tile.
template <class T>
static void write_slots(const Real *scores, const int *order, int slots, const View<T> &to, const RowTile &t, int r,
                        const ColumnTile &c, int head) {
    T *const row = to.at(t.z, t.y + r, 0, head);
    for (int s = 0; s < slots; s += lanes) {
        const int n = slots - s < lanes ? slots - s : lanes;
        Vec v[lanes] = {};
        for (int i = 0; i < n; i++) v[i] = load(scores + order[s + i]);
        transpose(v);
        for (int i = 0; i < c.n; i++) {
            T *const p = row + c.x[i] * to.x + s;
            if (n == lanes) store(p, v[c.lane[i]]);
            else store_part(p, v[c.lane[i]], n);
        }
    }
}

// Idle lanes read zero.
template <class T>
static void read_slots(Real *scores, const int *order, int slots, const View<const T> &from, const RowTile &t, int r,
                       const ColumnTile &c, int head) {
    const T *const row = from.at(t.z, t.y + r, 0, head);
    for (int s = 0; s < slots; s += lanes) {
        const int n = slots - s < lanes ? slots - s : lanes;
        Vec v[lanes] = {};
        for (int i = 0; i < c.n; i++) {
            const T *const p = row + c.x[i] * from.x + s;
            v[c.lane[i]] = n == lanes ? load(p) : load_part(p, n);
        }
        transpose(v);
        for (int i = 0; i < n; i++) store(scores + order[s + i], v[i]);
    }
}

} // namespace nbhd::NBHD_ISA
