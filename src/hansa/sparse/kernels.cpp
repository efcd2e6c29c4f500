// Kernels of sparse training. Compiled once per instruction set; exported names end in its name.
//
// Activations are [channel][row][column][sample]. All samples of a pixel lie side by side: a pixel
// of enough samples fills vectors, and a kernel's tap is the same run of floats at another offset,
// so no number of samples or channels is odd.
//
// Products go block by block: what a block of output pixels needs of the input is packed into a
// slab that stays near the core, with zeros around the image, and with the pixels that a stride
// leaves apart put side by side (phases). Weights are lists of (offset in the slab, value).
//
// Every output element is computed by one thread, in an order that does not depend on their
// number: results are equal bit for bit, whatever `threads` is.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#if !defined(__clang__)  // GCC 12 finds its own intrinsics uninitialised (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define RETURNS(type, name) \
    extern "C" __attribute__((visibility("default"))) type JOIN(hansa_##name, ISA)
#define EXPORT(name) RETURNS(void, name)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE inline __attribute__((always_inline))
#define OWN __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;          // floats of a vector
constexpr int TILE = 16;       // accumulators of a tile: half of the registers
constexpr int TAPS_HIGH = 3;   // taps whose gradient is held in registers at a time
constexpr int TAPS_WIDE = 3;
#elif defined(__AVX2__)
constexpr int V = 8;
constexpr int TILE = 8;
constexpr int TAPS_HIGH = 1;
constexpr int TAPS_WIDE = 3;
#else
constexpr int V = 4;
constexpr int TILE = 8;
constexpr int TAPS_HIGH = 1;
constexpr int TAPS_WIDE = 1;
#endif
constexpr int WIDE = 32 / V;   // vectors of output channels side by side in the weight gradient
// Bytes of the output's gradient, turned: what stays near the core, and what all input channels go
// over before the next part.
constexpr long NEAR = (V == 16 ? 768 : 640) << 10;
constexpr long PART = 80 << 10;

typedef float vec __attribute__((vector_size(V * 4)));
typedef float loose __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(V * 4)));

INLINE vec load(const float *p) { return *reinterpret_cast<const loose *>(p); }
INLINE void store(float *p, vec v) { *reinterpret_cast<loose *>(p) = v; }
INLINE vec all(float x) { return x - vec{}; }
// What is no number passes, as through PyTorch's ReLU.
INLINE vec positive(vec y, vec d) { return y <= vec{} ? vec{} : d; }
INLINE float sum(vec v) {
    float total = 0;
    for (int i = 0; i < V; i++) total += v[i];
    return total;
}
INLINE vec without_first(vec v, int count) {
    for (int i = 0; i < count; i++) v[i] = 0;
    return v;
}
INLINE bool kept(float x, float threshold) { return std::fabs(x) >= threshold && x != 0; }

// Memory of a thread for what one call packs, kept for the next. In large pages, where the system
// has them: what is read here lies all over it, and would miss the tables of small ones.
class Scratch {
  public:
    float *of(size_t floats) {
        constexpr size_t PAGE = 2 << 20;
        const size_t bytes = (floats * sizeof(float) + PAGE - 1) / PAGE * PAGE;
        if (bytes > held_) {
            memory_.reset();
            memory_.reset(static_cast<float *>(std::aligned_alloc(PAGE, bytes)));
            held_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
            madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float *p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t held_ = 0;
};
thread_local Scratch scratch;

// ---- tiles: rows x vectors of one output map ---------------------------------------------------

struct Tile {
    long y, x;
    int rows, vectors;
    int overlap;  // leading lanes that another tile has as well
};

// Cover `height` rows of `length` >= V floats. The last vector of a row ends where the row ends and
// may overlap its neighbour, which does no harm where outputs are stored and not added to.
void cover(long height, long length, std::vector<Tile> &out) {
    out.clear();
    const auto column = [&](long x, int vectors, int overlap) {
        for (long y = 0; y < height;) {
            int rows = 1;
            while (rows * 2 * vectors <= TILE && y + rows * 2 <= height) rows *= 2;
            out.push_back({y, x, rows, vectors, overlap});
            y += rows;
        }
    };
    // Tiles of two rows share more of what they read than tiles of one.
    const int widest = height >= 2 ? TILE / 2 : TILE;
    const long full = length / V, rest = length % V;
    for (long x = 0; x < full;) {
        int vectors = 1;
        while (vectors * 2 <= widest && x + vectors * 2 <= full) vectors *= 2;
        column(x * V, vectors, 0);
        x += vectors;
    }
    if (rest) column(length - V, 1, static_cast<int>(V - rest));
}

struct Pattern {  // rows of (offset in floats of the slab, value), each of so many units
    const int32_t *begin, *offset;
    const float *value;
    long units;
    long start(long row) const { return begin[row * units]; }
};

struct Run {  // where a tile reads and writes
    const float *in;
    float *out;
    long in_row, out_row, out_channel, out_vector;  // floats between neighbours
    const float *bias;
    bool stream;  // whether outputs pass by the caches, since they would not fit
    long from, to;    // units that are added up in this run
    float *sums;      // of earlier units, and for later ones
};

INLINE void put_out(float *p, vec v, bool stream) {
#if defined(__AVX512F__)
    if (stream) return _mm512_stream_ps(p, v);
#else
    (void)stream;
#endif
    store(p, v);
}

// The loops over kept entries are functions of their own, or too little of them stays in registers.
template <int R, int P>
OWN void sweep(const Pattern &w, const Run &run, long first, long last) {
    const float *rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = run.in + r * run.in_row;
    const int32_t *const offset = w.offset;
    const float *const value = w.value;
    // Few accumulators would wait for each other; several non-zeros at once keep them apart.
    constexpr int U = R * P >= 8 ? 1 : R * P >= 4 ? 2 : 4;
    for (long o = first; o < last; o++) {
        vec a[U][R][P];
        const vec start = all(run.bias ? run.bias[o] : 0.0f);
        float *const sums = run.sums + (o - first) * R * P * V;
        UNROLL for (int u = 0; u < U; u++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int p = 0; p < P; p++) a[u][r][p] = u ? vec{} : start;
        if (run.from)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int p = 0; p < P; p++) a[0][r][p] = load(sums + (r * P + p) * V);
        long j = w.begin[o * w.units + run.from];
        const long end = w.begin[o * w.units + run.to];
        for (; j + U <= end; j += U)
            UNROLL for (int u = 0; u < U; u++) {
                const long at = offset[j + u];
                const vec x = all(value[j + u]);
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int p = 0; p < P; p++)
                        a[u][r][p] += x * load(rows[r] + at + p * V);
            }
        for (; j < end; j++) {
            const long at = offset[j];
            const vec x = all(value[j]);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int p = 0; p < P; p++)
                    a[0][r][p] += x * load(rows[r] + at + p * V);
        }
        float *out = run.out + o * run.out_channel;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < P; p++) {
                vec total = a[0][r][p];
                UNROLL for (int u = 1; u < U; u++) total += a[u][r][p];
                if (run.to == w.units)
                    put_out(out + r * run.out_row + p * run.out_vector, total, run.stream);
                else
                    store(sums + (r * P + p) * V, total);
            }
    }
}

// Gradient of the stored entries: sums[j] += <out's gradient of row o, input at offset j>, V wide.
template <int R, int P>
OWN void sample(const Pattern &w, const Run &run, long first, long last, int overlap,
                float *sums) {
    const float *rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = run.in + r * run.in_row;
    for (long o = first; o < last; o++) {
        const float *gradient = run.out + o * run.out_channel;
        vec d[R][P];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < P; p++)
                d[r][p] = load(gradient + r * run.out_row + p * run.out_vector);
        if (overlap)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int p = 0; p < P; p++) d[r][p] = without_first(d[r][p], overlap);
        for (long j = w.start(o); j < w.start(o + 1); j++) {
            const long at = w.offset[j];
            vec s[4] = {load(sums + j * V), vec{}, vec{}, vec{}};
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int p = 0; p < P; p++)
                    s[(r * P + p) & 3] += d[r][p] * load(rows[r] + at + p * V);
            store(sums + j * V, (s[0] + s[1]) + (s[2] + s[3]));
        }
    }
}

// Call f<R, P>() for a tile's rows and vectors as constants.
template <int R, int P, class F>
void dispatch(const Tile &tile, F &&f) {
    if (tile.rows == R && tile.vectors == P) return f.template operator()<R, P>();
    if constexpr (R == 1 && P * 2 <= TILE) {
        if (tile.vectors > P) return dispatch<1, P * 2>(tile, f);
    }
    if constexpr (R * 2 * P <= TILE) return dispatch<R * 2, P>(tile, f);
}

struct Sweep {
    const Pattern &w;
    const Run &run;
    long first, last;
    template <int R, int P> void operator()() const { sweep<R, P>(w, run, first, last); }
};
struct Sample {
    const Pattern &w;
    const Run &run;
    long first, last;
    int overlap;
    float *sums;
    template <int R, int P> void operator()() const {
        sample<R, P>(w, run, first, last, overlap, sums);
    }
};

// ---- blocks of output pixels, and the slab of input that one needs -----------------------------

struct Block {
    long n, y, x, rows, columns;
    int overlap;  // leading samples that another block has as well
};

struct Blocks {
    long batch, pixel, rows, columns, OH, OW;  // `pixel`: samples of a block, all or V
    long vector;                               // floats between neighbouring vectors of the output
    long samples, high, wide, count;

    Blocks(long batch_, long pixel_, long rows_, long columns_, long OH_, long OW_)
        : batch(batch_), pixel(pixel_), rows(rows_), columns(columns_), OH(OH_), OW(OW_),
          vector(pixel_ == batch_ ? V : batch_), samples((batch_ + pixel - 1) / pixel),
          high((OH_ + rows_ - 1) / rows_), wide((OW_ + columns_ - 1) / columns_),
          count(samples * high * wide) {}

    // With `again`, a narrow last block of few samples begins earlier and does columns again.
    Block at(long k, bool again) const {
        // Samples change fastest: what lies side by side in memory is read one after the other.
        const long wanted = k % samples * pixel, n = std::min(wanted, batch - pixel);
        const long y = k / samples / wide * rows;
        long x = k / samples % wide * columns;
        if (again && batch < V) x = std::min(x, std::max(0L, OW - columns));
        return {n, y, x, std::min(rows, OH - y), std::min(columns, OW - x),
                static_cast<int>(wanted - n)};
    }
};

struct Source {
    const float *in;
    long C, H, W, batch, sh, sw, top, left, rows, columns;  // of the slab

    size_t size(long pixel) const {
        return static_cast<size_t>(C * sh * sw * rows * columns) * pixel;
    }

    // Pack [C][sh * sw][rows][columns][pixel]: phase (a, b) holds rows a, a + sh, ... and columns
    // b, b + sw, ... of the input around the block; what lies outside of the input is zero.
    void pack(const Block &b, long pixel, float *to) const {
        const long width = columns * pixel;
        for (long c = 0; c < C; c++)
            for (long phase = 0; phase < sh * sw; phase++) {
                const long x0 = b.x * sw + phase % sw - left;
                // Columns p with 0 <= x0 + p * sw < W.
                const long low = std::min(columns, x0 >= 0 ? 0 : (sw - 1 - x0) / sw);
                const long left_over = W - x0 <= 0 ? 0 : (W - x0 + sw - 1) / sw;
                const long high_end = std::max(low, std::min(columns, left_over));
                for (long r = 0; r < rows; r++, to += width) {
                    const long y = (b.y + r) * sh + phase / sw - top;
                    if (y < 0 || y >= H) {
                        std::memset(to, 0, width * sizeof(float));
                        continue;
                    }
                    std::memset(to, 0, low * pixel * sizeof(float));
                    const float *from = in + ((c * H + y) * W + x0) * batch + b.n;
                    if (pixel == batch && sw == 1)
                        std::memcpy(to + low * pixel, from + low * pixel,
                                    (high_end - low) * pixel * sizeof(float));
                    else if (pixel == V)
                        for (long p = low; p < high_end; p++)
                            store(to + p * V, load(from + p * sw * batch));
                    else
                        for (long p = low; p < high_end; p++)
                            std::memcpy(to + p * pixel, from + p * sw * batch,
                                        pixel * sizeof(float));
                    std::memset(to + high_end * pixel, 0,
                                (columns - high_end) * pixel * sizeof(float));
                }
            }
    }
};

// ---- transposition ------------------------------------------------------------------------------

#if defined(__AVX2__) && !defined(__AVX512F__)
// out[j][i] = in[i][j] for 8 x 8 floats.
INLINE void transpose8(const float *in, long in_row, float *out, long out_row) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 4; i++) {  // halves of rows i and i + 4 side by side
        const float *one = in + i * in_row, *other = one + 4 * in_row;
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(one)),
                                    _mm_loadu_ps(other), 1);
        a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(one + 4)),
                                        _mm_loadu_ps(other + 4), 1);
    }
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int k = 0; k < 2; k++) {
            const __m256 p = b[i + k], q = b[i + k + 2];
            float *to = out + (i + 2 * k) * out_row;
            _mm256_storeu_ps(to, _mm256_shuffle_ps(p, q, 0x44));
            _mm256_storeu_ps(to + out_row, _mm256_shuffle_ps(p, q, 0xee));
        }
}
#endif

// out[j][i] = in[i][j] for 16 x 16 floats.
INLINE void transpose16(const float *in, long in_row, float *out, long out_row) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(in + i * in_row);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
        UNROLL for (int k = 0; k < 2; k++) {
            const __m512d low = _mm512_castps_pd(b[i + k]), high = _mm512_castps_pd(b[i + k + 2]);
            a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    UNROLL for (int k = 0; k < 4; k++) {
        const __m512 p = _mm512_shuffle_f32x4(a[k], a[k + 4], 0x88);
        const __m512 q = _mm512_shuffle_f32x4(a[k], a[k + 4], 0xdd);
        const __m512 r = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0x88);
        const __m512 s = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0xdd);
        _mm512_storeu_ps(out + k * out_row, _mm512_shuffle_f32x4(p, r, 0x88));
        _mm512_storeu_ps(out + (k + 4) * out_row, _mm512_shuffle_f32x4(q, s, 0x88));
        _mm512_storeu_ps(out + (k + 8) * out_row, _mm512_shuffle_f32x4(p, r, 0xdd));
        _mm512_storeu_ps(out + (k + 12) * out_row, _mm512_shuffle_f32x4(q, s, 0xdd));
    }
#elif defined(__AVX2__)
    // Both halves of eight rows at once: rows may lie far apart, and their lines go soon.
    for (int top = 0; top < 16; top += 8) {
        const float *from = in + top * in_row;
        UNROLL for (int left = 0; left < 16; left += 8)
            transpose8(from + left, in_row, out + left * out_row + top, out_row);
    }
#else
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) out[j * out_row + i] = in[i * in_row + j];
#endif
}

void transpose(const float *in, long rows, long columns, long in_row, float *out, long out_row) {
    long j = 0;
    for (; j + 16 <= columns; j += 16) {
        long i = 0;
        for (; i + 16 <= rows; i += 16)
            transpose16(in + i * in_row + j, in_row, out + j * out_row + i, out_row);
        for (; i < rows; i++)
            for (long k = j; k < j + 16; k++) out[k * out_row + i] = in[i * in_row + k];
    }
    for (; j < columns; j++)
        for (long i = 0; i < rows; i++) out[j * out_row + i] = in[i * in_row + j];
}

// ---- weight gradient from a list of kept activations ------------------------------------------

// Taps (i, k) of a grid A high and B wide, N vectors of output channels:
// gradient[i][k][0..N * V) += value * d[index - i * row - k * column].
template <int A, int B, int N>
OWN void accumulate(const int32_t *index, const float *value, long count, const float *d, long row,
                long column, float *gradient, long high, long wide) {
    constexpr int U = A * B * N >= 8 ? 1 : 8 / (A * B * N);
    vec a[U][A][B][N];
    UNROLL for (int i = 0; i < A; i++)
        UNROLL for (int k = 0; k < B; k++)
            UNROLL for (int h = 0; h < N; h++) {
                a[0][i][k][h] = load(gradient + i * high + k * wide + h * V);
                UNROLL for (int u = 1; u < U; u++) a[u][i][k][h] = vec{};
            }
    long j = 0;
    for (; j + U <= count; j += U)
        UNROLL for (int u = 0; u < U; u++) {
            const float *p = d + index[j + u];
            const vec x = all(value[j + u]);
            UNROLL for (int i = 0; i < A; i++)
                UNROLL for (int k = 0; k < B; k++)
                    UNROLL for (int h = 0; h < N; h++)
                        a[u][i][k][h] += x * load(p - i * row - k * column + h * V);
        }
    for (; j < count; j++) {
        const float *p = d + index[j];
        const vec x = all(value[j]);
        UNROLL for (int i = 0; i < A; i++)
            UNROLL for (int k = 0; k < B; k++)
                UNROLL for (int h = 0; h < N; h++)
                    a[0][i][k][h] += x * load(p - i * row - k * column + h * V);
    }
    UNROLL for (int i = 0; i < A; i++)
        UNROLL for (int k = 0; k < B; k++)
            UNROLL for (int h = 0; h < N; h++) {
                vec total = a[0][i][k][h];
                UNROLL for (int u = 1; u < U; u++) total += a[u][i][k][h];
                store(gradient + i * high + k * wide + h * V, total);
            }
}

using Accumulate = decltype(&accumulate<1, 1, 1>);

// The function for a grid of so many rows and columns.
template <int A, int B, int N> Accumulate accumulator(long rows, long columns) {
    if constexpr (A < TAPS_HIGH) {
        if (rows > A) return accumulator<A + 1, B, N>(rows, columns);
    }
    if constexpr (B < TAPS_WIDE) {
        if (columns > B) return accumulator<A, B + 1, N>(rows, columns);
    }
    return accumulate<A, B, N>;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of kept lanes, where they come from when they are pressed together.
struct Presses {
    alignas(64) uint8_t from[256][8];
    constexpr Presses() : from() {
        for (int set = 0; set < 256; set++)
            for (int lane = 0, count = 0; lane < 8; lane++)
                if (set >> lane & 1) from[set][count++] = static_cast<uint8_t>(lane);
    }
};
constexpr Presses presses;

struct Kept {  // of eight floats
    int set;
    INLINE Kept(__m256 v, float threshold) {
        const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
        set = _mm256_movemask_ps(
            _mm256_and_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(threshold), _CMP_GE_OQ),
                          _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_OQ)));
    }
    INLINE int count() const { return __builtin_popcount(static_cast<unsigned>(set)); }
    INLINE __m256i from() const {
        return _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i *>(presses.from[set])));
    }
};
#endif

// Append the kept of n floats: their values, and base + step * position. Whole vectors have no branch,
// which would be guessed wrong where few are kept.
INLINE long compress(const float *x, long n, float threshold, int32_t base, int32_t step,
                     int32_t *index, float *value) {
    long count = 0, i = 0;
#if defined(__AVX512F__)
    // Zeros are less than any threshold but none: one comparison serves for both.
    const __m512 least = _mm512_set1_ps(threshold <= 0 ? FLT_TRUE_MIN : threshold);
    const __m512i lanes = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(step));
    for (; i < n; i += 16) {
        const __mmask16 there = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
        const __mmask16 keep =
            _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(v), least, _CMP_GE_OQ);
        const __m512i at = _mm512_add_epi32(
            lanes, _mm512_set1_epi32(base + static_cast<int32_t>(i) * step));
        // A compressing store is slow on some processors; the buffers leave room for whole ones.
        _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(keep, v));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, at));
        count += __builtin_popcount(keep);
    }
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                             _mm256_set1_epi32(step));
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        const Kept keep(v, threshold);
        const __m256i from = keep.from();
        const __m256i at = _mm256_add_epi32(
            lanes, _mm256_set1_epi32(base + static_cast<int32_t>(i) * step));
        _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps(v, from));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(index + count),
                            _mm256_permutevar8x32_epi32(at, from));
        count += keep.count();
    }
#endif
    for (; i < n; i++) {
        value[count] = x[i];
        index[count] = base + static_cast<int32_t>(i) * step;
        count += kept(x[i], threshold);
    }
    return count;
}

long floor_mod(long a, long b) { return ((a % b) + b) % b; }

}  // namespace

// The kept weights of [rows][columns] as rows of (offset, value), by output channel and again by
// `target` (class and input channel). Tables hold, by column, the offsets in both directions and
// the target; `plane` is what an output channel adds to a backward offset. Rows are of units, of
// `unit` columns and, backward, of `unit_back` output channels. `flat` receives each kept weight's
// place. All lists have room for every weight. Returns how many are kept.
RETURNS(long, pattern)(
    const float *w, float threshold, long rows, long columns, const int32_t *forward,
    const int32_t *backward, const int32_t *target, long plane, long targets, long unit,
    long unit_back, int32_t *begin, int32_t *offset, float *value, int32_t *flat,
    int32_t *begin_back, int32_t *offset_back, float *value_back) {
    const long units = (columns + unit - 1) / unit;
    long n = 0;
    for (long o = 0; o < rows; o++) {
        const float *row = w + o * columns;
        for (long u = 0; u < units; u++) {
            begin[o * units + u] = static_cast<int32_t>(n);
            const long end = std::min(columns, (u + 1) * unit);
            long j = u * unit;
#if defined(__AVX512F__)
            const __m512i lanes =
                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for (; j < end; j += 16) {
                const __mmask16 there =
                    end - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - j)) - 1);
                const __m512 v = _mm512_maskz_loadu_ps(there, row + j);
                __mmask16 keep = _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(v),
                                                         _mm512_set1_ps(threshold), _CMP_GE_OQ);
                keep = _mm512_mask_cmp_ps_mask(keep, v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
                if (!keep) continue;
                const __m512i at = _mm512_add_epi32(
                    lanes, _mm512_set1_epi32(static_cast<int32_t>(o * columns + j)));
                _mm512_mask_compressstoreu_ps(value + n, keep, v);
                _mm512_mask_compressstoreu_epi32(
                    offset + n, keep, _mm512_maskz_loadu_epi32(there, forward + j));
                _mm512_mask_compressstoreu_epi32(flat + n, keep, at);
                n += __builtin_popcount(keep);
            }
#else
            for (; j < end; j++)
                if (kept(row[j], threshold)) {
                    value[n] = row[j];
                    offset[n] = forward[j];
                    flat[n++] = static_cast<int32_t>(o * columns + j);
                }
#endif
        }
    }
    begin[rows * units] = static_cast<int32_t>(n);
    const long units_back = (rows + unit_back - 1) / unit_back;
    std::vector<int32_t> next(targets * units_back + 1, 0);
    // Calls f(kept weight, its output channel and column, the list it goes to).
    const auto each_kept = [&](auto &&f) {
        for (long o = 0; o < rows; o++)
            for (long k = begin[o * units]; k < begin[(o + 1) * units]; k++) {
                const long column = flat[k] - o * columns;
                f(k, o, column, target[column] * units_back + o / unit_back);
            }
    };
    each_kept([&](long, long, long, long list) { next[list + 1]++; });
    for (long t = 0; t < targets * units_back; t++) next[t + 1] += next[t];
    std::copy(next.begin(), next.end(), begin_back);
    each_kept([&](long k, long o, long column, long list) {
        const long at = next[list]++;
        offset_back[at] = static_cast<int32_t>(backward[column] + o * plane);
        value_back[at] = value[k];
    });
    return n;
}

// out [OC][OH][OW][N] = bias + the product of the weights with in [C][H][W][N]. An output pixel (y, x)
// meets input pixels around (y * sh - top, x * sw - left). Blocks are `rows` x `columns` output
// pixels of `samples` samples, all or V; slabs [C][sh * sw][slab_rows][slab_columns][samples].
EXPORT(convolve)(const float *in, long C, long H, long W, long batch, long sh, long sw, long top,
                 long left, long samples, long rows, long columns, long slab_rows,
                 long slab_columns,
                 const int32_t *begin, const int32_t *offset, const float *value, long OC,
                 long units, long step, const float *bias, float *out, long OH, long OW,
                 long threads) {
    const Source source{in, C, H, W, batch, sh, sw, top, left, slab_rows, slab_columns};
    const Pattern w{begin, offset, value, units};
    const Blocks blocks(batch, samples, rows, columns, OH, OW);
    const long parts = blocks.count >= 2 * threads ? 1 : std::min<long>(OC, 2 * threads);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && batch % 16 == 0;
    const bool stream = aligned && OC * OH * OW * batch * 4 > (4 << 20);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        float *const slab = scratch.of(source.size(blocks.pixel) + OC * TILE * V);
        float *const sums = slab + source.size(blocks.pixel);
        std::vector<Tile> tiles;
#pragma omp for schedule(static)
        for (long task = 0; task < blocks.count * parts; task++) {
            const Block b = blocks.at(task / parts, true);
            const long part = task % parts, first = OC * part / parts, last = OC * (part + 1) / parts;
            source.pack(b, blocks.pixel, slab);
            float *to = out + (b.y * OW + b.x) * batch + b.n;
            const long in_row = slab_columns * blocks.pixel, length = b.columns * blocks.pixel;
            if (length < V) {
                for (long o = first; o < last; o++)
                    for (long y = 0; y < b.rows; y++)
                        for (long x = 0; x < length; x++) {
                            float total = bias ? bias[o] : 0;
                            for (long j = w.start(o); j < w.start(o + 1); j++)
                                total += value[j] * slab[offset[j] + y * in_row + x];
                            to[(o * OH + y) * OW * batch + x] = total;
                        }
                continue;
            }
            cover(b.rows, length, tiles);
            for (const Tile &tile : tiles) {
                Run run{slab + tile.y * in_row + tile.x,
                        to + tile.y * OW * batch + tile.x / V * blocks.vector + tile.x % V,
                        in_row, OW * batch, OH * OW * batch, blocks.vector, bias, stream,
                        0, 0, sums};
                for (long unit = 0; unit < units; unit += step) {
                    run.from = unit, run.to = std::min(units, unit + step);
                    dispatch<1, 1>(tile, Sweep{w, run, first, last});
                }
            }
        }
    }
}

// gradient[j] = <d[o], in at the j-th entry's offset>, over the blocks of `convolve`: the weight
// gradient of a fixed mask.
EXPORT(sample)(const float *in, long C, long H, long W, long batch, long sh, long sw, long top,
               long left, long samples, long rows, long columns, long slab_rows,
               long slab_columns,
               const int32_t *begin, const int32_t *offset, long OC, long units, const float *d,
               long OH, long OW, float *gradient, long threads) {
    const Source source{in, C, H, W, batch, sh, sw, top, left, slab_rows, slab_columns};
    const Pattern w{begin, offset, nullptr, units};
    const Blocks blocks(batch, samples, rows, columns, OH, OW);
    std::vector<float> sums(static_cast<size_t>(w.start(OC)) * V, 0.0f);
    const long parts = std::min<long>(OC, threads);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long part = 0; part < parts; part++) {
        float *const slab = scratch.of(source.size(blocks.pixel));
        std::vector<Tile> tiles;
        const long first = OC * part / parts, last = OC * (part + 1) / parts;
        for (long k = 0; k < blocks.count; k++) {
            const Block b = blocks.at(k, false);
            source.pack(b, blocks.pixel, slab);
            const float *from = d + (b.y * OW + b.x) * batch + b.n;
            const long in_row = slab_columns * blocks.pixel, length = b.columns * blocks.pixel;
            if (length < V) {
                for (long o = first; o < last; o++)
                    for (long j = w.start(o); j < w.start(o + 1); j++)
                        for (long y = 0; y < b.rows; y++)
                            for (long x = 0; x < length; x++)
                                sums[j * V] += from[(o * OH + y) * OW * batch + x] *
                                               slab[offset[j] + y * in_row + x];
                continue;
            }
            cover(b.rows, length, tiles);
            for (const Tile &tile : tiles) {
                const Run run{slab + tile.y * in_row + tile.x,
                              const_cast<float *>(from) + tile.y * OW * batch +
                                  tile.x / V * blocks.vector + tile.x % V,
                              in_row, OW * batch, OH * OW * batch, blocks.vector, nullptr, false,
                              0, units, nullptr};
                const int overlap = std::max(tile.overlap, b.overlap);
                dispatch<1, 1>(tile, Sample{w, run, first, last, overlap, sums.data()});
            }
        }
        for (long j = w.start(first); j < w.start(last); j++) gradient[j] = sum(load(&sums[j * V]));
    }
}

namespace {

struct Gradient {  // the weight gradient's sizes, in the order of `hansa_gradient`'s arguments
    const float *a;
    float threshold;
    const float *d;
    float *gradient;
    long C, H, W, batch, OC, KH, KW, sh, sw, pad_top, pad_left, OH, OW, threads;

    template <int N> long add() const;
};

// Channels go by so many at a time as fill N vectors.
template <int N> long Gradient::add() const {
    struct Class {  // of input pixels in a part: the first, and the output pixel that it points to
        long y, x, to;
    };
    constexpr long lanes = N * V;
    const long groups = (OC + lanes - 1) / lanes, K = KH * KW, classes = sh * sw;
    const long top = (KH - 1) / sh, left = (KW - 1) / sw;  // rows and columns that taps reach back
    const long width = std::max((W - 1 + pad_left) / sw, OW - 1) + 1 + left;
    std::vector<float> sums(static_cast<size_t>(groups) * C * K * lanes, 0.0f);
    // A band is as many rows as keep its part of the output's gradient near, for some samples.
    // A pixel takes a little more than its samples, or all taps would meet in one set of the cache.
    const long some = std::min(batch, width * 32 * lanes * 32 < NEAR ? 32L : 16L);
    const long pixel = (some + 2) * lanes, row = width * pixel;
    const long bytes = row * static_cast<long>(sizeof(float));
    const long fit = std::max(1L, NEAR / bytes - top), band = std::min(fit * sh, H);
    const long reach = (band - 1) / sh + 2 + top;  // rows of the output that a band meets
    // Where taps are many, all channels go over one part of a band before the next: V samples of a
    // few pixels, which are then read again from nearby. Of few taps the lists would be too short.
    constexpr bool cut = N < WIDE;
    const long pixels = PART / (V * lanes * static_cast<long>(sizeof(float)));
    const long high = cut ? std::min(band, 4 * sh) : band;
    const long most = std::max(1L, pixels / ((high - 1) / sh + 1 + top) - left) * sw;
    const long along = cut ? (W + most - 1) / most : 1, wide = (W + along - 1) / along;
    const long down = (band + high - 1) / high, depth = cut ? V : some;
    const long deep = (some + depth - 1) / depth;
    // The taps that a class of input pixels meets, as many at a time as the registers hold.
    struct Taps {
        Accumulate add;
        long back, to;  // floats: before where an input pixel points, and in the weight's gradient
    };
    std::vector<std::vector<Taps>> taps(classes);
    for (long k = 0; k < classes; k++)
        for (long i = k / sw; i < KH; i += TAPS_HIGH * sh)
            for (long j = k % sw; j < KW; j += TAPS_WIDE * sw)
                taps[k].push_back({accumulator<1, 1, N>((KH - i + sh - 1) / sh, (KW - j + sw - 1) / sw),
                                   i / sh * row + j / sw * pixel, (i * KW + j) * lanes});
    // Channels in one list: all, unless a list that kept everything would be very long.
    const long block = std::max(1L, (1L << 24) / (band * W * some));
    const long parts = std::min<long>(C, threads);
    long total = 0;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) reduction(+ : total)
    for (long part = 0; part < parts; part++) {
        const long first = C * part / parts, last = C * (part + 1) / parts;
        const long held = std::min(block, last - first);
        // Not vectors, which would write zeros: most of this is never used.
        const size_t room = static_cast<size_t>(held) * band * W * some + 16;
        const std::unique_ptr<int32_t[]> index(new int32_t[room]);
        const std::unique_ptr<float[]> value(new float[room]);
        float *const near = scratch.of(static_cast<size_t>(reach) * row);
        std::vector<long> starts(down * along * held * classes * deep + 1);
        std::vector<Class> from(classes);
        for (long y0 = 0; y0 < H; y0 += band) {
            const long y1 = std::min(H, y0 + band), q0 = (y0 + pad_top) / sh;
            for (long n0 = 0; n0 < batch; n0 += some) {
                const long here = std::min(some, batch - n0);
                for (long c0 = first; c0 < last; c0 += block) {
                    const long c1 = std::min(last, c0 + block);
                    long n = 0, *start = starts.data();
                    for (long p = 0; p < down * along; p++) {
                        const long y_part = y0 + p / along * high, x_part = p % along * wide;
                        const long bottom = std::min(y1, y_part + high);
                        const long right = std::min(W, x_part + wide);
                        for (long k = 0; k < classes; k++) {
                            const long y = y_part + floor_mod(k / sw - pad_top - y_part, sh);
                            const long x = x_part + floor_mod(k % sw - pad_left - x_part, sw);
                            const long line = (y + pad_top) / sh - q0 + top;
                            from[k] = {y, x, (line * width + (x + pad_left) / sw + left) * pixel};
                        }
                        for (long c = c0; c < c1; c++)
                            for (const Class &k : from)
                                for (long z = 0; z < some; z += depth) {
                                    *start++ = n;
                                    const long count = std::min(depth, here - z);
                                    long line = k.to + z * lanes;
                                    for (long i = k.y; i < bottom; i += sh, line += row) {
                                        const float *x = a + (c * H + i) * W * batch + n0 + z;
                                        long to = line;
                                        for (long j = k.x; j < right; j += sw, to += pixel)
                                            n += compress(x + j * batch, count, threshold,
                                                          static_cast<int32_t>(to), lanes,
                                                          &index[n], &value[n]);
                                    }
                                }
                    }
                    *start = n;
                    total += n;
                    if (!n) continue;
                    for (long g = 0; g < groups; g++) {
                        const long there = std::min<long>(lanes, OC - g * lanes);
                        const long met = (y1 - 1 + pad_top) / sh - q0 + 1 + top;
                        for (long r = 0; r < met; r++) {
                            const long y = q0 - top + r;
                            float *to = near + r * row;
                            if (y < 0 || y >= OH || there < lanes)
                                std::memset(to, 0, row * sizeof(float));
                            if (y < 0 || y >= OH) continue;
                            std::memset(to, 0, left * pixel * sizeof(float));
                            std::memset(to + (left + OW) * pixel, 0,
                                        (width - left - OW) * pixel * sizeof(float));
                            const float *from = d + (g * lanes * OH + y) * OW * batch + n0;
                            for (long x = 0; x < OW; x++)
                                transpose(from + x * batch, there, here, OH * OW * batch,
                                          to + (left + x) * pixel, lanes);
                        }
                        for (long p = 0; p < down * along * deep; p++)
                            for (long c = c0; c < c1; c++)
                                for (long k = 0; k < classes; k++) {
                                    const long list = (p / deep * (c1 - c0) + c - c0) * classes + k;
                                    const long *at = &starts[list * deep + p % deep];
                                    if (at[0] == at[1]) continue;
                                    float *const to = &sums[(g * C + c) * K * lanes];
                                    for (const Taps &t : taps[k])
                                        t.add(&index[at[0]], &value[at[0]], at[1] - at[0],
                                              near - t.back, row, pixel, to + t.to,
                                              sh * KW * lanes, sw * lanes);
                                }
                    }
                }
            }
        }
    }
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long g = 0; g < groups; g++)
        transpose(&sums[g * C * K * lanes], C * K, std::min<long>(lanes, OC - g * lanes), lanes,
                  gradient + g * lanes * C * K, C * K);
    return total;
}

}  // namespace

// Dense weight gradient [OC][C][KH][KW] of activations a [C][H][W][N] of which only those of a
// magnitude of at least `threshold` count; d [OC][OH][OW][N] is the output's gradient. Returns how
// many activations count.
RETURNS(long, gradient)(const float *a, float threshold, const float *d, float *gradient, long C,
                        long H, long W, long batch, long OC, long KH, long KW, long sh, long sw,
                        long pad_top, long pad_left, long OH, long OW, long threads) {
    const Gradient g{a, threshold, d, gradient, C, H, W, batch, OC, KH, KW, sh, sw, pad_top, pad_left,
                     OH, OW, threads};
#if defined(__AVX512F__)
    // Many taps fill the registers by themselves; of few, more channels spare reading the list.
    if (std::min(KH, TAPS_HIGH * sh) / sh * (std::min(KW, TAPS_WIDE * sw) / sw) >= 6) return g.add<1>();
#endif
    return g.add<WIDE>();
}

// Put the phases of [C][phases][height][width][N] back into out [C][H][W][N], one at a time.
EXPORT(interleave)(const float *in, float *out, long channels, long height, long width, long batch,
                   long y0, long x0, long sh, long sw, long H, long W, long threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long r = 0; r < channels * height; r++) {
        const float *from = in + r * width * batch;
        float *to = out + ((r / height * H + r % height * sh + y0) * W + x0) * batch;
        for (long x = 0; x < width; x++)
            std::memcpy(to + x * sw * batch, from + x * batch, batch * sizeof(float));
    }
}

// out[j][i] = in[i][j] for a matrix of rows x columns.
EXPORT(transpose)(const float *in, float *out, long rows, long columns, long threads) {
    const long step = 256;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long j = 0; j < columns; j += step)
        transpose(in + j, rows, std::min(step, columns - j), columns, out + j * rows, rows);
}

// The k-th largest magnitude of n floats, 1 <= k <= n: the bits of a magnitude sort like the number.
RETURNS(float, kth)(const float *x, long n, long k) {
    constexpr int SHIFT = 19, BINS = 1 << (31 - SHIFT);
    std::vector<int64_t> counts(4 * BINS, 0);  // four, so that equal neighbours do not wait
    const auto bits = [x](long i) {
        uint32_t b;
        std::memcpy(&b, x + i, sizeof b);
        return b & 0x7fffffffu;
    };
    for (long i = 0; i < n; i++) counts[(i & 3) * BINS + (bits(i) >> SHIFT)]++;
    long above = 0;
    int bin = BINS - 1;
    for (;; bin--) {
        const long here = counts[bin] + counts[BINS + bin] + counts[2 * BINS + bin] +
                          counts[3 * BINS + bin];
        if (above + here >= k || !bin) break;
        above += here;
    }
    if (!bin) {  // what is left is next to nothing but zeros, of which a ReLU makes many
        long other = 0;
        for (long i = 0; i < n; i++) other += bits(i) != 0;
        if (k > other) return 0;
    }
    std::vector<uint32_t> candidates;
    for (long i = 0; i < n; i++)
        if (const uint32_t b = bits(i); static_cast<int>(b >> SHIFT) == bin) candidates.push_back(b);
    const auto nth = candidates.begin() + (k - above - 1);
    std::nth_element(candidates.begin(), nth, candidates.end(), std::greater<uint32_t>());
    float out;
    std::memcpy(&out, &*nth, sizeof out);
    return out;
}

// out = x where its magnitude is at least `threshold`, else 0.
EXPORT(prune)(const float *x, float threshold, float *out, long n, long threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long i = 0; i < n; i++) out[i] = std::fabs(x[i]) >= threshold ? x[i] : 0.0f;
}

namespace {

// One matrix turned; ROWS, where it is not 0, is their number known to the compiler.
template <long ROWS, class F>
INLINE void turn_one(const float *from, float *to, long rows, long columns, F &&f) {
    if (ROWS) rows = ROWS;
    for (long c = 0; c < columns; c++)
        for (long r = 0; r < rows; r++) to[c * rows + r] = f(from[r * columns + c]);
}

}  // namespace

// out[b][c][r] = x[b][r][c] where its magnitude is at least `threshold`, else 0: a convolution's
// weight to channels-last, and its gradient back. Without a threshold all is kept, what is no
// number as well.
EXPORT(turn)(const float *x, float threshold, float *out, long batch, long rows, long columns,
             long threads) {
    const long size = rows * columns;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long b = 0; b < batch; b++) {
        const float *from = x + b * size;
        float *to = out + b * size;
        if (!(threshold <= 0))  // by a threshold that is no number nothing is kept, as by `prune`
            turn_one<0>(from, to, rows, columns,
                        [&](float v) { return std::fabs(v) >= threshold ? v : 0.0f; });
        else if (rows == 9)  // a gradient of 3x3
            turn_one<9>(from, to, rows, columns, [](float v) { return v; });
        else
            turn_one<0>(from, to, rows, columns, [](float v) { return v; });
    }
}

// ---- normalisation, with the residual that is added and the ReLU that follows --------------------

namespace {

template <class T> INLINE T get(const float *p);
template <> INLINE vec get<vec>(const float *p) { return load(p); }
template <> INLINE float get<float>(const float *p) { return *p; }
INLINE void put(float *p, vec v) { store(p, v); }
INLINE void put(float *p, float v) { *p = v; }
template <class T> INLINE T fill(float x);
template <> INLINE vec fill<vec>(float x) { return all(x); }
template <> INLINE float fill<float>(float x) { return x; }
INLINE float positive(float y, float d) { return y <= 0 ? 0 : d; }
INLINE float sum(float v) { return v; }
INLINE vec drop(vec v, int count) { return without_first(v, count); }
INLINE float drop(float v, int) { return v; }
INLINE vec inverse_root(vec v) {
    for (int i = 0; i < V; i++) v[i] = 1 / std::sqrt(v[i]);
    return v;
}
INLINE float inverse_root(float v) { return 1 / std::sqrt(v); }

// f(offset, vec or float) for every part of n floats.
template <class F>
INLINE void each(long n, F &&f) {
    long i = 0;
    for (; i + V <= n; i += V) f(i, vec{});
    for (; i < n; i++) f(i, 0.0f);
}

// The sum over n floats of what f returns for each part.
template <class F>
INLINE double total_of(long n, F &&f) {
    vec a[4] = {};
    long i = 0;
    for (; i + 4 * V <= n; i += 4 * V) UNROLL for (int k = 0; k < 4; k++) a[k] += f(i + k * V, vec{});
    for (; i + V <= n; i += V) a[0] += f(i, vec{});
    double total = sum((a[0] + a[1]) + (a[2] + a[3]));
    for (; i < n; i++) total += f(i, 0.0f);
    return total;
}

// The sum over `count` steps of what f returns, lane by lane.
template <class T, class F>
INLINE T lane_sum(long count, F &&f) {
    T a[4] = {};
    long i = 0;
    for (; i + 4 <= count; i += 4) UNROLL for (int k = 0; k < 4; k++) a[k] += f(i + k);
    for (; i < count; i++) a[0] += f(i);
    return (a[0] + a[1]) + (a[2] + a[3]);
}

struct GroupNorm {
    const float *x, *residual, *scale, *shift, *d;
    float *y, *mean, *inverse, *dx, *dresidual, *dscale, *dshift;
    long channels, pixels, batch;  // channels of one group
    long relu;
    float epsilon;

    template <class T>
    void forward(long group, long n) const {
        const long c0 = group * channels, step = batch, size = pixels * batch;
        const float count = static_cast<float>(channels * pixels);
        const float *from = x + c0 * size + n;
        const long all_pixels = channels * pixels;  // the channels of a group lie side by side
        const T m = lane_sum<T>(all_pixels, [&](long i) { return get<T>(from + i * step); }) / count;
        const T v = lane_sum<T>(all_pixels, [&](long i) {
                        const T e = get<T>(from + i * step) - m;
                        return e * e;
                    }) / count;
        const T s = inverse_root(v + epsilon);
        put(mean + group * batch + n, m);
        put(inverse + group * batch + n, s);
        for (long c = c0; c < c0 + channels; c++) {
            const T a = s * fill<T>(scale ? scale[c] : 1.0f);
            const T b = fill<T>(shift ? shift[c] : 0.0f) - m * a;
            for (long i = 0; i < pixels; i++) {
                const long at = c * size + i * step + n;
                T out = get<T>(x + at) * a + b;
                if (residual) out += get<T>(residual + at);
                if (relu) out = positive(out, out);
                put(y + at, out);
            }
        }
    }

    template <class T>
    void backward(long group, long n, int overlap) const {
        const long c0 = group * channels, step = batch, size = pixels * batch;
        const T m = get<T>(mean + group * batch + n), s = get<T>(inverse + group * batch + n);
        T first{}, second{};
        for (long c = c0; c < c0 + channels; c++) {
            T plain[2] = {}, scaled[2] = {};
            for (long i = 0; i < pixels; i++) {
                const long at = c * size + i * step + n;
                T e = get<T>(d + at);
                if (relu) e = positive(get<T>(y + at), e);
                if (dresidual) put(dresidual + at, e);
                plain[i & 1] += e;
                scaled[i & 1] += e * (get<T>(x + at) - m);
            }
            const T p = plain[0] + plain[1], q = (scaled[0] + scaled[1]) * s;
            const float g = scale ? scale[c] : 1.0f;
            first += p * fill<T>(g);
            second += q * fill<T>(g);
            if (dshift) dshift[c] += sum(drop(p, overlap));
            if (dscale) dscale[c] += sum(drop(q, overlap));
        }
        const float count = static_cast<float>(channels * pixels);
        first = first / count;
        second = second / count * s;
        for (long c = c0; c < c0 + channels; c++) {
            const T g = fill<T>(scale ? scale[c] : 1.0f);
            for (long i = 0; i < pixels; i++) {
                const long at = c * size + i * step + n;
                T e = get<T>(d + at);
                if (relu) e = positive(get<T>(y + at), e);
                put(dx + at, s * (e * g - first - (get<T>(x + at) - m) * second));
            }
        }
    }
};

}  // namespace

// y = relu((x - mean) * inverse * scale + shift + residual) over [C][size], mean and variance by
// channel; a null pointer leaves its part out. Running statistics move by `momentum`.
EXPORT(batch_norm)(const float *x, const float *residual, const float *scale, const float *shift,
                   float *y, float *mean, float *inverse, float *running_mean,
                   float *running_variance, long C, long size, long relu, float momentum,
                   float epsilon, long threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long c = 0; c < C; c++) {
        const float *from = x + c * size;
        const double count = static_cast<double>(size);
        const float m = static_cast<float>(total_of(size, [&](long i, auto kind) {
                            return get<decltype(kind)>(from + i);
                        }) / count);
        const double v = total_of(size, [&](long i, auto kind) {
                             const auto e = get<decltype(kind)>(from + i) - m;
                             return e * e;
                         }) / count;
        const float s = static_cast<float>(1 / std::sqrt(v + epsilon));
        mean[c] = m;
        inverse[c] = s;
        if (running_mean) {
            const float unbiased = static_cast<float>(v * count / (count - 1));
            running_mean[c] += momentum * (m - running_mean[c]);
            running_variance[c] += momentum * (unbiased - running_variance[c]);
        }
        const float a = s * (scale ? scale[c] : 1), b = (shift ? shift[c] : 0) - m * a;
        each(size, [&](long i, auto kind) {
            using T = decltype(kind);
            T out = get<T>(from + i) * a + b;
            if (residual) out += get<T>(residual + c * size + i);
            if (relu) out = positive(out, out);
            put(y + c * size + i, out);
        });
    }
}

EXPORT(batch_norm_back)(const float *d, const float *x, const float *y, const float *scale,
                        const float *mean, const float *inverse, float *dx, float *dresidual,
                        float *dscale, float *dshift, long C, long size, long relu, long threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long c = 0; c < C; c++) {
        const long at = c * size;
        const float m = mean[c], s = inverse[c];
        const auto incoming = [&](long i, auto kind) {
            using T = decltype(kind);
            const T e = get<T>(d + at + i);
            return relu ? positive(get<T>(y + at + i), e) : e;
        };
        const double plain = total_of(size, [&](long i, auto kind) {
            const auto e = incoming(i, kind);
            if (dresidual) put(dresidual + at + i, e);
            return e;
        });
        const double scaled = total_of(size, [&](long i, auto kind) {
            return incoming(i, kind) * (get<decltype(kind)>(x + at + i) - m);
        });
        if (dshift) dshift[c] = static_cast<float>(plain);
        if (dscale) dscale[c] = static_cast<float>(scaled) * s;
        const float a = s * (scale ? scale[c] : 1);
        const float b = static_cast<float>(plain / size);
        const float e = static_cast<float>(scaled / size) * s * s;
        each(size, [&](long i, auto kind) {
            using T = decltype(kind);
            put(dx + at + i, (incoming(i, kind) - b - (get<T>(x + at + i) - m) * e) * a);
        });
    }
}

namespace {

// Rows [size][C] in blocks whose three or four arrays stay near the core; what is found for a block
// does not depend on the number of threads.
struct Rows {
    long C, size, rows, count;
    Rows(long C, long size)
        : C(C), size(size), rows(std::max(8L, 4096 / C)), count((size + rows - 1) / rows) {}
    long length(long block) const { return std::min(rows, size - block * rows); }
};

// f(first column, accumulators) for every part of C columns, as wide as a few vectors.
template <class F>
INLINE void columns(long C, F &&f) {
    long c = 0;
    for (; c + 4 * V <= C; c += 4 * V) f(c, vec{}, std::integral_constant<int, 4>{});
    for (; c + V <= C; c += V) f(c, vec{}, std::integral_constant<int, 1>{});
    for (; c < C; c++) f(c, 0.0f, std::integral_constant<int, 1>{});
}

}  // namespace

// The same over [size][C]: channels-last.
EXPORT(batch_norm_last)(const float *x, const float *residual, const float *scale,
                        const float *shift, float *y, float *mean, float *inverse,
                        float *running_mean, float *running_variance, long C, long size, long relu,
                        float momentum, float epsilon, long threads) {
    const Rows part(C, size);
    std::vector<float> parts(static_cast<size_t>(2 * C * part.count)), lines(static_cast<size_t>(2 * C));
    float *found = parts.data(), *a = lines.data(), *b = a + C;
    const double count = static_cast<double>(size);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp for schedule(static)
        for (long block = 0; block < part.count; block++) {
            const long rows = part.length(block);
            const float *from = x + block * part.rows * C;
            float *m = found + 2 * C * block;
            columns(C, [&](long c, auto kind, auto wide) {
                using T = decltype(kind);
                constexpr int W = decltype(wide)::value, step = sizeof(T) / sizeof(float);
                T middle[W] = {}, square[W] = {};
                for (long r = 0; r < rows; r++)
                    UNROLL for (int w = 0; w < W; w++) middle[w] += get<T>(from + r * C + c + w * step);
                UNROLL for (int w = 0; w < W; w++) middle[w] = middle[w] / static_cast<float>(rows);
                for (long r = 0; r < rows; r++)
                    UNROLL for (int w = 0; w < W; w++) {
                        const T e = get<T>(from + r * C + c + w * step) - middle[w];
                        square[w] += e * e;
                    }
                UNROLL for (int w = 0; w < W; w++) {
                    put(m + c + w * step, middle[w]);
                    put(m + C + c + w * step, square[w]);
                }
            });
        }
#pragma omp for schedule(static)
        for (long c = 0; c < C; c++) {
            double m = 0, v = 0;
            for (long block = 0; block < part.count; block++)
                m += found[2 * C * block + c] * static_cast<double>(part.length(block));
            m /= count;
            for (long block = 0; block < part.count; block++) {
                const double e = found[2 * C * block + c] - m;
                v += found[2 * C * block + C + c] + e * e * static_cast<double>(part.length(block));
            }
            mean[c] = static_cast<float>(m);
            inverse[c] = static_cast<float>(1 / std::sqrt(v / count + epsilon));
            if (running_mean) {
                running_mean[c] += momentum * (mean[c] - running_mean[c]);
                const float unbiased = static_cast<float>(v / (count - 1));
                running_variance[c] += momentum * (unbiased - running_variance[c]);
            }
            a[c] = inverse[c] * (scale ? scale[c] : 1);
            b[c] = (shift ? shift[c] : 0) - mean[c] * a[c];
        }
#pragma omp for schedule(static)
        for (long r = 0; r < size; r++) {
            each(C, [&](long c, auto kind) {
                using T = decltype(kind);
                const long at = r * C + c;
                T out = get<T>(x + at) * get<T>(a + c) + get<T>(b + c);
                if (residual) out += get<T>(residual + at);
                if (relu) out = positive(out, out);
                put(y + at, out);
            });
        }
    }
}

// Where nothing was added before the ReLU, whether it let a value pass is worked out again from x,
// which is read anyway: y is then null.
EXPORT(batch_norm_last_back)(const float *d, const float *x, const float *y, const float *scale,
                             const float *shift, const float *mean, const float *inverse, float *dx,
                             float *dresidual, float *dscale, float *dshift, long C, long size,
                             long relu, long threads) {
    const Rows part(C, size);
    std::vector<float> parts(static_cast<size_t>(2 * C * part.count)), lines(static_cast<size_t>(4 * C));
    float *found = parts.data(), *a = lines.data(), *b = a + C, *slope = b + C, *base = slope + C;
    const double count = static_cast<double>(size);
    for (long c = 0; c < C; c++) {
        a[c] = inverse[c] * (scale ? scale[c] : 1);
        base[c] = (shift ? shift[c] : 0) - mean[c] * a[c];
    }
    // The gradient before the ReLU of the part of row `at` that starts with column c.
    const auto before = [&](long at, long c, auto value) {
        using T = decltype(value);
        const T e = get<T>(d + at);
        if (!relu) return e;
        return positive(y ? get<T>(y + at) : get<T>(x + at) * get<T>(a + c) + get<T>(base + c), e);
    };
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp for schedule(static)
        for (long block = 0; block < part.count; block++) {
            const long rows = part.length(block), start = block * part.rows * C;
            float *plain = found + 2 * C * block;
            columns(C, [&](long c, auto kind, auto wide) {
                using T = decltype(kind);
                constexpr int W = decltype(wide)::value, step = sizeof(T) / sizeof(float);
                T middle[W], total[W] = {}, scaled[W] = {};
                UNROLL for (int w = 0; w < W; w++) middle[w] = get<T>(mean + c + w * step);
                for (long r = 0; r < rows; r++)
                    UNROLL for (int w = 0; w < W; w++) {
                        const long column = c + w * step, at = start + r * C + column;
                        const T e = before(at, column, kind);
                        if (dresidual) put(dresidual + at, e);
                        total[w] += e;
                        scaled[w] += e * (get<T>(x + at) - middle[w]);
                    }
                UNROLL for (int w = 0; w < W; w++) {
                    put(plain + c + w * step, total[w]);
                    put(plain + C + c + w * step, scaled[w]);
                }
            });
        }
#pragma omp for schedule(static)
        for (long c = 0; c < C; c++) {
            double total = 0, scaled = 0;
            for (long block = 0; block < part.count; block++) {
                total += found[2 * C * block + c];
                scaled += found[2 * C * block + C + c];
            }
            if (dshift) dshift[c] = static_cast<float>(total);
            if (dscale) dscale[c] = static_cast<float>(scaled) * inverse[c];
            // dx = (e - b - (x - mean) slope) a, with what does not depend on the row put together.
            slope[c] = static_cast<float>(scaled / count) * inverse[c] * inverse[c];
            b[c] = static_cast<float>(total / count) - mean[c] * slope[c];
        }
#pragma omp for schedule(static)
        for (long r = 0; r < size; r++) {
            each(C, [&](long c, auto kind) {
                using T = decltype(kind);
                const long at = r * C + c;
                const T e = dresidual ? get<T>(dresidual + at) : before(at, c, kind);
                put(dx + at, (e - get<T>(b + c) - get<T>(x + at) * get<T>(slope + c)) * get<T>(a + c));
            });
        }
    }
}

// The same by sample and group of channels, over [C][pixels][N]; mean and inverse are [groups][N].
EXPORT(group_norm)(const float *x, const float *residual, const float *scale, const float *shift,
                   float *y, float *mean, float *inverse, long C, long groups, long pixels,
                   long batch, long relu, float epsilon, long threads) {
    GroupNorm norm{};
    norm.x = x, norm.residual = residual, norm.scale = scale, norm.shift = shift, norm.y = y;
    norm.mean = mean, norm.inverse = inverse, norm.channels = C / groups, norm.pixels = pixels;
    norm.batch = batch, norm.relu = relu, norm.epsilon = epsilon;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long g = 0; g < groups; g++)
        if (batch < V)
            for (long n = 0; n < batch; n++) norm.forward<float>(g, n);
        else
            for (long n = 0; n < batch; n += V) norm.forward<vec>(g, std::min(n, batch - V));
}

EXPORT(group_norm_back)(const float *d, const float *x, const float *y, const float *scale,
                        float *mean, float *inverse, float *dx, float *dresidual, float *dscale,
                        float *dshift, long C, long groups, long pixels, long batch, int relu,
                        long threads) {
    GroupNorm norm{};
    norm.x = x, norm.scale = scale, norm.d = d, norm.y = const_cast<float *>(y), norm.mean = mean;
    norm.inverse = inverse, norm.dx = dx, norm.dresidual = dresidual, norm.dscale = dscale;
    norm.dshift = dshift, norm.channels = C / groups, norm.pixels = pixels, norm.batch = batch;
    norm.relu = relu;
    if (dscale) std::fill(dscale, dscale + C, 0.0f);
    if (dshift) std::fill(dshift, dshift + C, 0.0f);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (long g = 0; g < groups; g++)
        if (batch < V)
            for (long n = 0; n < batch; n++) norm.backward<float>(g, n, 0);
        else
            for (long n = 0; n < batch; n += V) {
                const long at = std::min(n, batch - V);
                norm.backward<vec>(g, at, static_cast<int>(n - at));
            }
}
