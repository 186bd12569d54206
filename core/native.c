/* Steps of streams for one thread, in float32: what PyTorch needs hundreds of calls for, in one.

   A step multiplies every matrix by one row or two, so it is as fast as the weights come from
   memory. Here two rows of a matrix are read side by side, which keeps more reads under way, and
   nothing waits between one product and the next. The many rows of a search lie side by side in
   registers instead, for each number of a matrix. Every function has a slow twin in PyTorch, which
   tests hold it to; native.py compiles this file where it first runs and checks shapes. All widths
   are multiples of 16. No function keeps anything or allocates. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Numbers of a register: a longer vector would go through memory, which takes five times as long. */
#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

int64_t lanes(void) { return LANES; }

INLINE floats at(const float *p) { return *(const floats *)p; }

INLINE floats pick(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

INLINE float total(floats a) {
    float part[LANES];
    memcpy(part, &a, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE float largest(floats a) {
    float most = a[0];
    for (int i = 1; i < LANES; i++) most = a[i] > most ? a[i] : most;
    return most;
}

/* e to the power of x <= 0: 2^n times the series of what is left, |left| <= ln 2 / 2. */
INLINE floats exp_of(floats x) {
    x = pick(x < -87.0f, (floats){0} - 87.0f, x);
    ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints); /* towards zero */
    floats whole = __builtin_convertvector(n, floats);
    floats f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats sum = f * (1.0f / 5040) + 1.0f / 720;
    sum = sum * f + 1.0f / 120;
    sum = sum * f + 1.0f / 24;
    sum = sum * f + 1.0f / 6;
    sum = sum * f + 0.5f;
    sum = sum * f + 1.0f;
    sum = sum * f + 1.0f;
    return sum * (floats)((n + 127) << 23);
}

INLINE floats silu(floats x) {
    floats e = exp_of(pick(x < 0.0f, x, -x)), one = (floats){0} + 1.0f;
    return x * pick(x < 0.0f, e, one) / (e + 1.0f);
}

/* x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26 (to 1.5e-7). */
INLINE floats gelu(floats x) {
    floats z = pick(x < 0.0f, -x, x) * 0.70710678f;
    floats t = 1.0f / (z * 0.3275911f + 1.0f);
    floats sum = t * 1.061405429f - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    floats rest = sum * t * exp_of(-(z * z)); /* 1 - erf |z| */
    return x * 0.5f * pick(x < 0.0f, rest, 2.0f - rest);
}

/* What two rows of a matrix and R <= 4 rows x [R, n] give: sums[2][R]. */
INLINE void dots(const float *one, const float *two, const float *x, int64_t stride, int64_t n,
                 const int R, float *sums) {
    floats a[2][4] = {{{0}}}, b[2][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        floats w0 = at(one + i), w1 = at(one + i + LANES);
        floats v0 = at(two + i), v1 = at(two + i + LANES);
        for (int r = 0; r < R; r++) {
            const float *y = x + r * stride + i;
            a[0][r] += w0 * at(y), b[0][r] += w1 * at(y + LANES);
            a[1][r] += v0 * at(y), b[1][r] += v1 * at(y + LANES);
        }
    }
    for (; i < n; i += LANES)
        for (int r = 0; r < R; r++) {
            floats y = at(x + r * stride + i);
            a[0][r] += at(one + i) * y, a[1][r] += at(two + i) * y;
        }
    for (int s = 0; s < 2; s++)
        for (int r = 0; r < R; r++) sums[s * R + r] = total(a[s][r] + b[s][r]);
}

INLINE void rows_of(const float *w, const float *bias, const float *x, float *y, int64_t stride,
                    int64_t in, int64_t out, int add, const int R) {
    int64_t half = (out + 1) / 2;
    for (int64_t o = 0; o < half; o++) {
        int64_t other = o + half < out ? o + half : o;
        float sums[8];
        dots(w + o * in, w + other * in, x, stride, in, R, sums);
        for (int r = 0; r < R; r++) {
            float *to = y + r * out;
            float first = sums[r], second = sums[R + r];
            if (add) first += to[o], second += to[other];
            if (bias) first += bias[o], second += bias[other];
            to[o] = first, to[other] = second;
        }
    }
}

/* x [rows, in] times w -> y [rows, out]. w is [in / part, out, part]: stretches of its rows. */
void product(const float *w, const float *bias, const float *x, float *y, int64_t rows, int64_t in,
             int64_t out, int64_t part) {
    for (int64_t r = 0, some; r < rows; r += some) {
        some = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t at = 0; at < in; at += part) {
            const float *stretch = w + at * out, *from = x + r * in + at, *b = at ? 0 : bias;
            if (some == 4)
                rows_of(stretch, b, from, y + r * out, in, part, out, at > 0, 4);
            else if (some == 2)
                rows_of(stretch, b, from, y + r * out, in, part, out, at > 0, 2);
            else
                rows_of(stretch, b, from, y + r * out, in, part, out, at > 0, 1);
        }
    }
}

/* w [out, in] times rows that lie side by side, [in, V * LANES] -> y [rows, all]. */
INLINE void columns_of(const float *w, const float *bias, const float *side, float *y,
                       int64_t rows, int64_t in, int64_t out, int64_t all, int add, const int V) {
    for (int64_t o = 0; o < out; o += 4) {
        const float *from[4];
        floats sums[4][2] = {{{0}}};
        for (int a = 0; a < 4; a++) from[a] = w + (o + a < out ? o + a : o) * in;
        for (int64_t i = 0; i < in; i++)
            for (int v = 0; v < V; v++) {
                floats column = at(side + (i * V + v) * LANES);
                for (int a = 0; a < 4; a++) sums[a][v] += column * from[a][i];
            }
        for (int a = 0; a < 4 && o + a < out; a++)
            for (int64_t r = 0; r < rows; r++) {
                float *to = y + r * all + o + a, sum = sums[a][r / LANES][r % LANES];
                if (add) sum += *to;
                if (bias) sum += bias[o + a];
                *to = sum;
            }
    }
}

/* The same as `product`, for more rows. room: of floats, part * 2 * LANES. */
void columns(const float *w, const float *bias, const float *x, float *y, int64_t rows, int64_t in,
             int64_t out, int64_t part, float *room) {
    for (int64_t first = 0; first < rows; first += 2 * LANES) {
        int64_t some = rows - first < 2 * LANES ? rows - first : 2 * LANES;
        int64_t wide = some > LANES ? 2 * LANES : LANES;
        for (int64_t at = 0; at < in; at += part) {
            const float *from = x + first * in + at, *b = at ? 0 : bias;
            for (int64_t i = 0; i < part; i++)
                for (int64_t r = 0; r < wide; r++)
                    room[i * wide + r] = r < some ? from[r * in + i] : 0;
            if (wide > LANES)
                columns_of(w + at * out, b, room, y + first * out, some, part, out, out, at > 0, 2);
            else
                columns_of(w + at * out, b, room, y + first * out, some, part, out, out, at > 0, 1);
        }
    }
}

/* RMSNorm (shift NULL) or LayerNorm of x [dim]. */
static void norm(const float *gain, const float *shift, float eps, const float *x, float *y,
                 int64_t dim) {
    floats sum = {0}, square = {0};
    float mean = 0;
    if (shift) {
        for (int64_t i = 0; i < dim; i += LANES) sum += at(x + i);
        mean = total(sum) / dim;
    }
    for (int64_t i = 0; i < dim; i += LANES) {
        floats d = at(x + i) - mean;
        square += d * d;
    }
    float scale = 1.0f / sqrtf(total(square) / dim + eps);
    for (int64_t i = 0; i < dim; i += LANES) {
        floats z = (at(x + i) - mean) * scale * at(gain + i);
        *(floats *)(y + i) = shift ? z + at(shift + i) : z;
    }
}

/* One query q [width] on `count` keys from cell `first` of a ring on -> y [width]. The `old` first
   ones are `more` numbers away from where the others are. */
static void attend(const float *q, const float *k, const float *v, int64_t first, int64_t count,
                   int64_t old, int64_t more, int64_t ring, int64_t width, float *scores,
                   float *y) {
    float scale = 1.0f / sqrtf((float)width), pair[2];
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = 0, cell = first % ring; i < count; i += 2) {
        int64_t next = cell + 1 < ring ? cell + 1 : 0;
        const float *one = k + cell * width + (i < old ? more : 0), *two = one;
        if (i + 1 < count) two = k + next * width + (i + 1 < old ? more : 0);
        dots(one, two, q, width, width, 1, pair);
        scores[i] = pair[0] * scale, scores[i + 1] = pair[1] * scale;
        cell = next + 1 < ring ? next + 1 : 0;
    }
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    floats most = at(scores), sum = {0};
    for (int64_t i = LANES; i < padded; i += LANES)
        most = pick(at(scores + i) > most, at(scores + i), most);
    float top = largest(most);
    for (int64_t i = 0; i < padded; i += LANES) {
        floats e = exp_of(at(scores + i) - top);
        if (i + LANES > count)
            for (int64_t j = count - i; j < LANES; j++) e[j] = 0;
        sum += e;
        *(floats *)(scores + i) = e;
    }
    float share = 1.0f / total(sum);
    for (int64_t d = 0; d < width; d += 4 * LANES) {
        int64_t wide = width - d < 4 * LANES ? (width - d) / LANES : 4;
        floats sums[4] = {{0}};
        for (int64_t i = 0, cell = first % ring; i < count; i++) {
            const float *from = v + cell * width + d + (i < old ? more : 0);
            if (wide == 4)
                for (int j = 0; j < 4; j++) sums[j] += at(from + j * LANES) * scores[i];
            else
                for (int64_t j = 0; j < wide; j++) sums[j] += at(from + j * LANES) * scores[i];
            cell = cell + 1 < ring ? cell + 1 : 0;
        }
        for (int64_t j = 0; j < wide; j++) *(floats *)(y + d + j * LANES) = sums[j] * share;
    }
}

typedef struct {
    int64_t layers, dim, heads, kv_heads, hidden, gated, part; /* part: of the last matrix */
    int64_t ring, context; /* keys kept, keys seen */
    int64_t apart;         /* numbers from the keys of a slot to those of the next */
    float eps;
} Shape;

enum { FEW = 8 }; /* rows up to which weights are read for each four of them */

static void multiply(const float *w, const float *x, float *y, int64_t rows, int64_t in,
                     int64_t out, int64_t part, float *side) {
    if (rows > FEW)
        columns(w, 0, x, y, rows, in, out, part, side);
    else
        product(w, 0, x, y, rows, in, out, part);
}

enum { GAIN1, SHIFT1, QKV, OUT, GAIN2, SHIFT2, UP, DOWN, WEIGHTS };

/* x [rows, dim], a step of a stream each, through a stack, in place.

   clocks, slots [rows]: which step of which stream; those of one stream follow each other.
   weights [layers, WEIGHTS]; caches [layers, 2], keys and values: [slots, kv_heads, ring, width].
   turns [rows, width]: cosine and sine of every pair of a head's numbers; NULL: no positions.
   alike [rows]: the slot whose keys before the latest `own` are those of this one, too; NULL: none.
   room: of floats, rows * (2 * dim + qkv + up + hidden) + ring + 2 * LANES, and of more than FEW
   rows max(dim, part) * 2 * LANES more. */
void stack(const float *const *weights, float *const *caches, const Shape *shape,
           const float *turns, const int64_t *clocks, const int64_t *slots, const int64_t *alike,
           int64_t own, int64_t rows, float *x, float *room) {
    const Shape s = *shape;
    int64_t width = s.dim / s.heads, all = (s.heads + 2 * s.kv_heads) * width;
    int64_t group = s.heads / s.kv_heads, into = s.gated ? 2 * s.hidden : s.hidden;
    float *y = room, *z = y + rows * s.dim, *qkv = z + rows * s.dim, *up = qkv + rows * all;
    float *act = up + rows * into, *scores = act + rows * s.hidden;
    float *side = scores + s.ring + 2 * LANES;
    for (int64_t layer = 0; layer < s.layers; layer++) {
        const float *const *w = weights + layer * WEIGHTS;
        float *k = caches[2 * layer], *v = caches[2 * layer + 1];
        for (int64_t r = 0; r < rows; r++)
            norm(w[GAIN1], w[SHIFT1], s.eps, x + r * s.dim, y + r * s.dim, s.dim);
        multiply(w[QKV], y, qkv, rows, s.dim, all, s.dim, side);
        for (int64_t r = 0; r < rows; r++) {
            float *q = qkv + r * all, *new_k = q + s.heads * width;
            int64_t cell = clocks[r] % s.ring, base = slots[r] * s.apart;
            if (turns)
                for (int64_t i = 0; i < (s.heads + s.kv_heads) * width; i += 2) {
                    const float *turn = turns + r * width + i % width;
                    float re = q[i], im = q[i + 1];
                    q[i] = re * turn[0] - im * turn[1];
                    q[i + 1] = re * turn[1] + im * turn[0];
                }
            for (int64_t h = 0; h < s.kv_heads; h++) {
                float *to = k + base + (h * s.ring + cell) * width;
                memcpy(to, new_k + h * width, width * sizeof(float));
                to = v + base + (h * s.ring + cell) * width;
                memcpy(to, new_k + (s.kv_heads + h) * width, width * sizeof(float));
            }
        }
        for (int64_t h = 0; h < s.heads; h++)
            for (int64_t r = 0; r < rows; r++) {
                int64_t last = clocks[r], first = last >= s.context ? last - s.context + 1 : 0;
                int64_t from = slots[r] * s.apart + h / group * s.ring * width;
                int64_t old = alike && last - own >= first ? last - own - first + 1 : 0;
                int64_t more = old ? (alike[r] - slots[r]) * s.apart : 0;
                attend(qkv + r * all + h * width, k + from, v + from, first, last - first + 1,
                       old, more, s.ring, width, scores, y + r * s.dim + h * width);
            }
        multiply(w[OUT], y, z, rows, s.dim, s.dim, s.dim, side);
        for (int64_t i = 0; i < rows * s.dim; i++) x[i] += z[i];
        for (int64_t r = 0; r < rows; r++)
            norm(w[GAIN2], w[SHIFT2], s.eps, x + r * s.dim, y + r * s.dim, s.dim);
        multiply(w[UP], y, up, rows, s.dim, into, s.dim, side);
        for (int64_t r = 0; r < rows; r++) {
            const float *from = up + r * into;
            float *to = act + r * s.hidden;
            for (int64_t i = 0; i < s.hidden; i += LANES)
                *(floats *)(to + i) =
                    s.gated ? silu(at(from + i)) * at(from + s.hidden + i) : gelu(at(from + i));
        }
        multiply(w[DOWN], act, z, rows, s.hidden, s.dim, s.part, side);
        for (int64_t i = 0; i < rows * s.dim; i++) x[i] += z[i];
    }
}

/* Some cells of rings become those of others: to [n] slots from [n] slots, cells [n, count] of each.

   rings [tensors]: [slots, heads, ring, width]. room: of floats, n * count * heads * width. */
void follow(float *const *rings, int64_t tensors, int64_t heads, int64_t ring, int64_t width,
            const int64_t *to, const int64_t *from, const int64_t *cells, int64_t n, int64_t count,
            float *room) {
    int64_t apart = heads * ring * width, bytes = width * sizeof(float);
    for (int64_t t = 0; t < tensors; t++)
        for (int back = 0; back < 2; back++) { /* all are read before one is written */
            float *kept = room;
            for (int64_t i = 0; i < n; i++)
                for (int64_t h = 0; h < heads; h++)
                    for (int64_t c = 0; c < count; c++, kept += width) {
                        int64_t at = (h * ring + cells[i * count + c]) * width;
                        if (back)
                            memcpy(rings[t] + to[i] * apart + at, kept, bytes);
                        else
                            memcpy(kept, rings[t] + from[i] * apart + at, bytes);
                    }
        }
}

/* The nearest entries, book after book, of rest [dim], from which they are taken away.

   books [count, 2]: centroids [size, dim] and half of their squared lengths [size]. */
void nearest(const float *const *books, int64_t count, int64_t size, int64_t dim, float *rest,
             int64_t *codes) {
    int64_t half = (size + 1) / 2;
    for (int64_t book = 0; book < count; book++) {
        const float *entries = books[2 * book], *lengths = books[2 * book + 1];
        float best[2] = {INFINITY, INFINITY}, pair[2];
        int64_t found[2] = {0, 0};
        for (int64_t i = 0; i < half; i++) {
            int64_t other = i + half < size ? i + half : i;
            dots(entries + i * dim, entries + other * dim, rest, dim, dim, 1, pair);
            float far = lengths[i] - pair[0];
            if (far < best[0]) best[0] = far, found[0] = i;
            far = lengths[other] - pair[1];
            if (far < best[1]) best[1] = far, found[1] = other;
        }
        int64_t code = best[1] < best[0] ? found[1] : found[0];
        for (int64_t i = 0; i < dim; i++) rest[i] -= entries[code * dim + i];
        codes[book] = code;
    }
}

enum { PATHS = 32, BOOKS = 64 }; /* at most */

typedef struct {
    float far;
    int64_t path, code;
} Found;

/* Put what is found in its place among `kept` sorted ones of at most `most`. -> how many */
INLINE int64_t insert(Found *best, int64_t kept, int64_t most, Found found) {
    int64_t at = kept < most ? kept++ : most - 1;
    for (; at > 0 && found.far < best[at - 1].far; at--) best[at] = best[at - 1];
    best[at] = found;
    return kept;
}

/* The codes of x [dim] on the nearest of `beam` paths that are kept from book to book.

   books [count, 3]: centroids [size, dim], the same turned, LANES at a time, [size / LANES, dim,
   LANES], half of their squared lengths. room: of floats, 2 * beam * dim. size is a multiple of
   LANES. */
void search(const float *const *books, int64_t count, int64_t size, int64_t dim, int64_t beam,
            const float *x, float *room, int64_t *codes) {
    float *left = room, *next = room + beam * dim, length[PATHS];
    int64_t paths = 1, code[BOOKS][PATHS], from[BOOKS][PATHS];
    memcpy(left, x, dim * sizeof(float));
    for (int64_t book = 0; book < count; book++) {
        const float *entries = books[3 * book], *turned = books[3 * book + 1];
        const float *half = books[3 * book + 2];
        Found best[PATHS];
        int64_t kept = 0;
        for (int64_t p = 0; p < paths; p++) {
            floats square = {0};
            for (int64_t d = 0; d < dim; d += LANES)
                square += at(left + p * dim + d) * at(left + p * dim + d);
            length[p] = total(square) / 2;
        }
        for (int64_t i = 0; i < size; i += LANES)
            for (int64_t first = 0; first < paths; first += 4) {
                const float *y[4];
                floats sums[4] = {{0}};
                for (int j = 0; j < 4; j++)
                    y[j] = left + (first + j < paths ? first + j : first) * dim;
                for (int64_t d = 0; d < dim; d++) {
                    floats entry = at(turned + i * dim + d * LANES);
                    for (int j = 0; j < 4; j++) sums[j] += entry * y[j][d];
                }
                for (int j = 0; j < 4 && first + j < paths; j++) {
                    floats far = at(half + i) - sums[j] + length[first + j];
                    float worst = kept < beam ? INFINITY : best[beam - 1].far;
                    ints nearer = far < worst;
                    int64_t any[LANES / 2];
                    memcpy(any, &nearer, sizeof any);
                    for (int k = 1; k < LANES / 2; k++) any[0] |= any[k];
                    for (int k = 0; any[0] && k < LANES; k++)
                        if (kept < beam || far[k] < best[beam - 1].far)
                            kept = insert(best, kept, beam, (Found){far[k], first + j, i + k});
                }
            }
        for (int64_t p = 0; p < kept; p++) {
            const float *old = left + best[p].path * dim, *taken = entries + best[p].code * dim;
            for (int64_t d = 0; d < dim; d++) next[p * dim + d] = old[d] - taken[d];
            code[book][p] = best[p].code, from[book][p] = best[p].path;
        }
        float *done = left;
        left = next, next = done, paths = kept;
    }
    int64_t p = 0;
    for (int64_t book = count - 1; book >= 0; book--) {
        codes[book] = code[book][p];
        p = from[book][p];
    }
}
