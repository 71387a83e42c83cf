/* The worker's kernels for the CPU: matrix products from weights as published, experts, paged attention.
 *
 * Weights are read as the checkpoint stores them, bfloat16 or MXFP4 at 4.25 bits, and widened to float32 in registers, which is exact; every
 * sum runs in float32. A row's result is the same to the bit whoever shares its batch: each product is summed over 16 lanes, in the order of
 * the columns, and then over the lanes in the order of `sum4`, however many rows and outputs a tile holds.
 *
 * Knows nothing of Python, torch or models: pointers to contiguous arrays come in, results go out. Callers check shapes.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { LANES = 16, BLOCK = 32 };   /* BLOCK: MXFP4 values under one scale, and the columns of one step of a tile */
enum { F32, BF16, MXFP4 };         /* how weights are stored */
enum { TILE_OUTS = 4 };            /* of a tile of sums in registers; TILE_ROWS depends on how many registers there are */
enum { PREFETCH_BYTES = 8192 };    /* ahead of what is computed */
enum { PLACES_AHEAD = 16 };
enum { FEW_ROWS = 8 };             /* whose elementwise work is done before other threads have heard of it */
enum { ROW_BLOCK = 48, OUT_BLOCK = 64 };  /* of one piece of work: its rows stay in the second-level cache */

static const float MXFP4_VALUES[LANES] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
static float SCALES[256]; /* E8M0: powers of two from 2^-127, then a NaN */

__attribute__((constructor)) static void fill_scales(void) {
    for (int byte = 0; byte < 255; byte++) SCALES[byte] = ldexpf(1.0f, byte - 127);
    SCALES[255] = NAN;
}

/* --- 16 floats ------------------------------------------------------------------------------------------------------------------------ */

#if defined(__AVX512F__) && defined(__AVX512BW__)

#include <immintrin.h>
#define NAME "avx512"
enum { TILE_ROWS = 6 }; /* 24 of 32 registers hold sums */
typedef __m512 lanes;

INLINE lanes zero(void) { return _mm512_setzero_ps(); }
INLINE lanes spread(float x) { return _mm512_set1_ps(x); }
INLINE lanes load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, lanes a) { _mm512_storeu_ps(p, a); }
INLINE lanes fma16(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
/* A permutation looks at the low four bits of each lane's index, so 16 values are one register. */
INLINE void load_mxfp4(const uint8_t *block, uint8_t scale, lanes *even, lanes *odd) {
    const lanes values = _mm512_mul_ps(load(MXFP4_VALUES), spread(SCALES[scale]));
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)block));
    *even = _mm512_permutexvar_ps(codes, values);
    *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
}
INLINE void sum4(lanes a, lanes b, lanes c, lanes d, float *sums) {
    const lanes ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const lanes cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const lanes quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

#elif defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#define NAME "avx2"
enum { TILE_ROWS = 1 }; /* 8 of 16 registers hold sums */
typedef struct { __m256 low, high; } lanes;

INLINE lanes zero(void) { return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE lanes spread(float x) { return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE lanes load(const float *p) { return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, lanes a) { _mm256_storeu_ps(p, a.low), _mm256_storeu_ps(p + 8, a.high); }
INLINE lanes fma16(lanes a, lanes b, lanes c) {
    return (lanes){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE __m256 widen_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE lanes load_bf16(const uint16_t *p) { return (lanes){widen_bf16(p), widen_bf16(p + 8)}; }
/* Twice the value is a small integer: a byte shuffle looks it up, and half the scale takes the factor back. */
INLINE lanes widen_mxfp4(__m128i codes, __m256 half_scale) {
    const __m128i twice = _mm_shuffle_epi8(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), codes);
    return (lanes){_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(twice)), half_scale),
                   _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(twice, 8))), half_scale)};
}
INLINE void load_mxfp4(const uint8_t *block, uint8_t scale, lanes *even, lanes *odd) {
    const __m256 half_scale = _mm256_set1_ps(0.5f * SCALES[scale]);
    const __m128i bytes = _mm_loadu_si128((const __m128i *)block), low = _mm_set1_epi8(15);
    *even = widen_mxfp4(_mm_and_si128(bytes, low), half_scale);
    *odd = widen_mxfp4(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), half_scale);
}
INLINE __m256 quarters4(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
}
INLINE void sum4(lanes a, lanes b, lanes c, lanes d, float *sums) {
    const __m256 halves = _mm256_add_ps(quarters4(a.low, b.low, c.low, d.low), quarters4(a.high, b.high, c.high, d.high));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

#else /* plain C, which compilers turn into whatever vectors there are */

#define NAME "plain"
enum { TILE_ROWS = 1 };
typedef struct { float at[LANES]; } lanes;

INLINE lanes spread(float x) {
    lanes a;
    for (int i = 0; i < LANES; i++) a.at[i] = x;
    return a;
}
INLINE lanes zero(void) { return spread(0); }
INLINE lanes load(const float *p) {
    lanes a;
    memcpy(a.at, p, sizeof a.at);
    return a;
}
INLINE void store(float *p, lanes a) { memcpy(p, a.at, sizeof a.at); }
INLINE lanes fma16(lanes a, lanes b, lanes c) {
#ifdef FP_FAST_FMAF
    for (int i = 0; i < LANES; i++) c.at[i] = fmaf(a.at[i], b.at[i], c.at[i]);
#else
    for (int i = 0; i < LANES; i++) c.at[i] += a.at[i] * b.at[i];
#endif
    return c;
}
INLINE lanes load_bf16(const uint16_t *p) {
    uint32_t bits[LANES];
    lanes a;
    for (int i = 0; i < LANES; i++) bits[i] = (uint32_t)p[i] << 16;
    memcpy(a.at, bits, sizeof bits);
    return a;
}
INLINE void load_mxfp4(const uint8_t *block, uint8_t scale, lanes *even, lanes *odd) {
    for (int i = 0; i < LANES; i++) {
        even->at[i] = MXFP4_VALUES[block[i] & 15] * SCALES[scale];
        odd->at[i] = MXFP4_VALUES[block[i] >> 4] * SCALES[scale];
    }
}
INLINE float sum1(lanes a) {
    float quarters[4];
    for (int i = 0; i < 4; i++) quarters[i] = (a.at[4 * i] + a.at[4 * i + 2]) + (a.at[4 * i + 1] + a.at[4 * i + 3]);
    return (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
}
INLINE void sum4(lanes a, lanes b, lanes c, lanes d, float *sums) {
    sums[0] = sum1(a), sums[1] = sum1(b), sums[2] = sum1(c), sums[3] = sum1(d);
}

#endif

/* --- products ------------------------------------------------------------------------------------------------------------------------- */

/* Rows [outs, width] in one of the three forms. MXFP4 columns count as split: in each block of 32 the even ones come first. */
typedef struct {
    int kind;
    size_t width;
    const uint8_t *values, *scales;
} Weights;

INLINE size_t row_bytes(const Weights *w) {
    return w->kind == F32 ? 4 * w->width : w->kind == BF16 ? 2 * w->width : w->width / 2;
}

/* Columns [column, column + 32) of a row. */
INLINE void load_weights(int kind, const uint8_t *values, const uint8_t *scales, size_t column, lanes *first, lanes *second) {
    if (kind == F32) {
        *first = load((const float *)values + column), *second = load((const float *)values + column + LANES);
    } else if (kind == BF16) {
        *first = load_bf16((const uint16_t *)values + column), *second = load_bf16((const uint16_t *)values + column + LANES);
    } else {
        load_mxfp4(values + column / 2, scales[column / BLOCK], first, second);
    }
}

/* The columns behind the last whole block, with zeros behind them; MXFP4 has none. */
static void load_rest(int kind, const uint8_t *values, size_t column, size_t width, lanes *first, lanes *second) {
    float rest[BLOCK] = {0};
    if (kind == F32) {
        memcpy(rest, (const float *)values + column, 4 * (width - column));
    } else {
        uint32_t bits[BLOCK] = {0};
        for (size_t i = column; i < width; i++) bits[i - column] = (uint32_t)((const uint16_t *)values)[i] << 16;
        memcpy(rest, bits, sizeof rest);
    }
    *first = load(rest), *second = load(rest + LANES);
}

/* sums[r][o] = x[r] . w[o] for `rows` <= TILE_ROWS and TILE_OUTS weight rows; `rows` and `kind` are constants wherever this is inlined. */
INLINE void tile(int kind, int rows, size_t width, const float *const *x, const uint8_t *const *values, const uint8_t *const *scales,
                 float sums[][TILE_OUTS]) {
    lanes total[TILE_ROWS][TILE_OUTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int o = 0; o < TILE_OUTS; o++) total[r][o] = zero();
    const size_t whole = width / BLOCK * BLOCK;
    for (size_t column = 0; column < whole; column += BLOCK) {
        lanes w[2][TILE_OUTS];
        UNROLL for (int o = 0; o < TILE_OUTS; o++) load_weights(kind, values[o], scales[o], column, &w[0][o], &w[1][o]);
        if (kind != F32) /* the next tiles, in the order of memory: what the hardware does not foresee in four short rows */
            for (size_t line = 0; line < TILE_OUTS * 2; line += kind == BF16 ? 2 : 8)
                __builtin_prefetch(values[0] + PREFETCH_BYTES + (kind == BF16 ? 8 * column + 32 * line : 2 * column));
        UNROLL for (int half = 0; half < 2; half++) {
            UNROLL for (int r = 0; r < rows; r++) {
                const lanes own = load(x[r] + column + half * LANES);
                UNROLL for (int o = 0; o < TILE_OUTS; o++) total[r][o] = fma16(w[half][o], own, total[r][o]);
            }
        }
    }
    if (kind != MXFP4 && whole < width) {
        UNROLL for (int o = 0; o < TILE_OUTS; o++) {
            lanes first, second, left, right;
            load_rest(kind, values[o], whole, width, &first, &second);
            UNROLL for (int r = 0; r < rows; r++) {
                load_rest(F32, (const uint8_t *)x[r], whole, width, &left, &right);
                total[r][o] = fma16(second, right, fma16(first, left, total[r][o]));
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) sum4(total[r][0], total[r][1], total[r][2], total[r][3], sums[r]);
}

#define TILE_CASE(kind, rows) \
    case rows: tile(kind, rows <= TILE_ROWS ? rows : TILE_ROWS, width, x, values, scales, sums); break;
#define TILE_OF(kind) \
    static void tile_##kind(int rows, size_t width, const float *const *x, const uint8_t *const *values, const uint8_t *const *scales, \
                            float sums[][TILE_OUTS]) { \
        switch (rows) { TILE_CASE(kind, 1) TILE_CASE(kind, 2) TILE_CASE(kind, 3) TILE_CASE(kind, 4) TILE_CASE(kind, 5) TILE_CASE(kind, 6) } \
    }
TILE_OF(F32)
TILE_OF(BF16)
TILE_OF(MXFP4)

INLINE int divide_up(int a, int b) { return (a + b - 1) / b; }

/* out[r * stride + o - begin] = x[r] . w[o] for o in [begin, end). A tile's rows stay in the first-level cache, the weights in the second. */
static void multiply(const Weights *w, size_t begin, size_t end, const float *const *x, int rows, float *out, size_t stride) {
    void (*const tiles[])(int, size_t, const float *const *, const uint8_t *const *, const uint8_t *const *, float[][TILE_OUTS]) = {
        tile_F32, tile_BF16, tile_MXFP4};
    float sums[TILE_ROWS][TILE_OUTS];
    for (int row = 0, num_rows; row < rows; row += num_rows) {
        num_rows = divide_up(rows - row, divide_up(rows - row, TILE_ROWS)); /* 8 as 4 and 4, not as 6 and 2 */
        for (size_t first = begin; first < end; first += TILE_OUTS) {
            const uint8_t *values[TILE_OUTS], *scales[TILE_OUTS];
            const size_t num = end - first < TILE_OUTS ? end - first : TILE_OUTS;
            for (size_t o = 0; o < TILE_OUTS; o++) { /* a last tile that is not full computes its last output again */
                const size_t at = first + (o < num ? o : num - 1);
                values[o] = w->values + at * row_bytes(w);
                scales[o] = w->scales + at * (w->width / BLOCK);
            }
            tiles[w->kind](num_rows, w->width, x + row, values, scales, sums);
            for (int r = 0; r < num_rows; r++) memcpy(out + (size_t)(row + r) * stride + (first - begin), sums[r], num * sizeof(float));
        }
    }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- linear --------------------------------------------------------------------------------------------------------------------------- */

/* x [rows, width] float32, weights [outs, width] float32 or bfloat16, bias [outs] float32 or NULL -> out [rows, outs] float32. */
void ossia_linear(const float *x, const void *weights, int is_bf16, const float *bias, float *out, int64_t rows, int64_t width, int64_t outs) {
    const Weights w = {is_bf16 ? BF16 : F32, (size_t)width, weights, NULL};
    const int64_t row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, out_blocks = (outs + OUT_BLOCK - 1) / OUT_BLOCK;
#pragma omp parallel
    {
        const float *x_rows[ROW_BLOCK];
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < row_blocks * out_blocks; piece++) {
            const int64_t row = piece / out_blocks * ROW_BLOCK, begin = piece % out_blocks * OUT_BLOCK;
            const int64_t end = least(begin + OUT_BLOCK, outs);
            const int num_rows = (int)least(rows - row, ROW_BLOCK);
            for (int r = 0; r < num_rows; r++) x_rows[r] = x + (row + r) * width;
            multiply(&w, (size_t)begin, (size_t)end, x_rows, num_rows, out + row * outs + begin, (size_t)outs);
            for (int r = 0; bias && r < num_rows; r++)
                for (int64_t o = begin; o < end; o++) out[(row + r) * outs + o] += bias[o];
        }
    }
}

/* --- experts -------------------------------------------------------------------------------------------------------------------------- */

/* e^x to 2 units in the last place, without branches, so that compilers compute many at once (after Cephes, https://www.netlib.org/cephes). */
INLINE float exponential(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float whole = rintf(bounded * 1.44269504f);
    const float rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : power * scale;
}

/* (up + 1) * gate * sigmoid(alpha * gate) of 32 pairs of gate and up; given back split as the columns of MXFP4 weights are. */
static void swiglu(const float *sums, const float *bias, float alpha, float limit, float *out) {
    float gates[BLOCK], ups[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const int pair = 2 * (i % LANES) + i / LANES;
        gates[i] = sums[2 * pair] + bias[2 * pair], ups[i] = sums[2 * pair + 1] + bias[2 * pair + 1];
    }
    for (int i = 0; i < BLOCK; i++) {
        const float gate = gates[i] > limit ? limit : gates[i], up = ups[i] > limit ? limit : ups[i] < -limit ? -limit : ups[i];
        out[i] = (up + 1) * gate / (1 + exponential(-alpha * gate));
    }
}

/* Ids and weights [rows, chosen] of the largest of logits [rows, experts], the lower id first where they are equal: a softmax over them. */
void ossia_route(const float *logits, int64_t *expert_ids, float *expert_weights, int64_t rows, int64_t num_experts, int64_t num_chosen) {
    for (int64_t row = 0; row < rows; row++, logits += num_experts, expert_ids += num_chosen, expert_weights += num_chosen) {
        float total = 0;
        for (int64_t rank = 0; rank < num_chosen; rank++) {
            int64_t best = -1;
            for (int64_t expert = 0; expert < num_experts; expert++) {
                int is_taken = 0;
                for (int64_t before = 0; before < rank; before++) is_taken |= expert_ids[before] == expert;
                if (!is_taken && (best < 0 || logits[expert] > logits[best])) best = expert;
            }
            expert_ids[rank] = best;
            total += expert_weights[rank] = exponential(logits[best] - logits[expert_ids[0]]);
        }
        for (int64_t rank = 0; rank < num_chosen; rank++) expert_weights[rank] /= total;
    }
}

/* Which rows each expert computes: places [expert_begins[e], expert_begins[e + 1]) of `slots`, each a row * num_chosen + rank. */
static void group_by_expert(const int64_t *expert_ids, int64_t num_slots, int64_t num_experts, int64_t *expert_begins, int64_t *slots) {
    memset(expert_begins, 0, sizeof(int64_t) * (size_t)(num_experts + 2));
    for (int64_t slot = 0; slot < num_slots; slot++) expert_begins[expert_ids[slot] + 2]++;
    for (int64_t expert = 0; expert < num_experts; expert++) expert_begins[expert + 2] += expert_begins[expert + 1];
    for (int64_t slot = 0; slot < num_slots; slot++) slots[expert_begins[expert_ids[slot] + 1]++] = slot;
}

/* One piece of an expert's work: these slots, against all outputs. */
typedef struct {
    int64_t expert, begin, end;
} Piece;

/* x [rows, hidden] float32; expert_ids and expert_weights [rows, chosen]; gate_up [experts, 2 * inner, hidden] and down
 * [experts, hidden, inner] as MXFP4 blocks and scales, gate_up_bias [experts, 2 * inner] float32 -> out [rows, hidden] float32.
 * Returns 0, or 1 where there is not enough memory. */
int ossia_experts(const float *x, const int64_t *expert_ids, const float *expert_weights, const uint8_t *gate_up_blocks,
                  const uint8_t *gate_up_scales, const float *gate_up_bias, const uint8_t *down_blocks, const uint8_t *down_scales, float *out,
                  int64_t rows, int64_t hidden, int64_t inner, int64_t num_experts, int64_t num_chosen, float alpha, float limit) {
    const int64_t num_slots = rows * num_chosen;
    const int64_t max_pieces = num_experts + num_slots / ROW_BLOCK;
    int64_t *const begins = malloc(sizeof(int64_t) * (size_t)(num_experts + 2 + num_slots));
    Piece *const pieces = malloc(sizeof(Piece) * (size_t)max_pieces);
    float *const split = malloc(sizeof(float) * (size_t)(rows * hidden + num_slots * (inner + hidden)));
    if (!begins || !pieces || !split) {
        free(begins), free(pieces), free(split);
        return 1;
    }
    int64_t *const slots = begins + num_experts + 2;
    float *const activated = split + rows * hidden, *const outputs = activated + num_slots * inner; /* by slot */

    group_by_expert(expert_ids, num_slots, num_experts, begins, slots);
    int64_t num_pieces = 0;
    for (int64_t expert = 0; expert < num_experts; expert++)
        for (int64_t begin = begins[expert]; begin < begins[expert + 1]; begin += ROW_BLOCK)
            pieces[num_pieces++] = (Piece){expert, begin, least(begin + ROW_BLOCK, begins[expert + 1])};
    const int64_t gate_up_parts = inner / BLOCK, down_parts = (hidden + OUT_BLOCK - 1) / OUT_BLOCK;

#pragma omp parallel
    {
        const float *x_rows[ROW_BLOCK];
        float sums[ROW_BLOCK * OUT_BLOCK];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < hidden; column += BLOCK)
                for (int i = 0; i < BLOCK; i++) split[row * hidden + column + i % 2 * LANES + i / 2] = x[row * hidden + column + i];
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < num_pieces * gate_up_parts; part++) {
            const Piece piece = pieces[part / gate_up_parts];
            const int64_t begin = part % gate_up_parts * OUT_BLOCK;
            const int num_rows = (int)(piece.end - piece.begin);
            const Weights w = {MXFP4, (size_t)hidden, gate_up_blocks + piece.expert * inner * hidden, gate_up_scales + piece.expert * 2 * inner * (hidden / BLOCK)};
            for (int r = 0; r < num_rows; r++) x_rows[r] = split + slots[piece.begin + r] / num_chosen * hidden;
            multiply(&w, (size_t)begin, (size_t)begin + OUT_BLOCK, x_rows, num_rows, sums, OUT_BLOCK);
            for (int r = 0; r < num_rows; r++)
                swiglu(sums + r * OUT_BLOCK, gate_up_bias + piece.expert * 2 * inner + begin, alpha, limit,
                       activated + slots[piece.begin + r] * inner + begin / 2);
        }
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < num_pieces * down_parts; part++) {
            const Piece piece = pieces[part / down_parts];
            const int64_t begin = part % down_parts * OUT_BLOCK, end = least(begin + OUT_BLOCK, hidden);
            const int num_rows = (int)(piece.end - piece.begin);
            const Weights w = {MXFP4, (size_t)inner, down_blocks + piece.expert * hidden * (inner / 2), down_scales + piece.expert * hidden * (inner / BLOCK)};
            for (int r = 0; r < num_rows; r++) x_rows[r] = activated + slots[piece.begin + r] * inner;
            multiply(&w, (size_t)begin, (size_t)end, x_rows, num_rows, sums, OUT_BLOCK);
            for (int r = 0; r < num_rows; r++)
                memcpy(outputs + slots[piece.begin + r] * hidden + begin, sums + r * OUT_BLOCK, sizeof(float) * (size_t)(end - begin));
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            memset(out + row * hidden, 0, sizeof(float) * (size_t)hidden);
            for (int64_t slot = row * num_chosen; slot < (row + 1) * num_chosen; slot++)
                for (int64_t i = 0; i < hidden; i++) out[row * hidden + i] += expert_weights[slot] * outputs[slot * hidden + i];
        }
    }
    free(begins), free(pieces), free(split);
    return 0;
}

/* out = x + sum of expert_weights[row][rank] * bias[expert_ids[row][rank]]; x and out [rows, hidden], bias [experts, hidden]. */
void ossia_add_down_bias(const float *x, const float *bias, const int64_t *expert_ids, const float *expert_weights, float *out, int64_t rows,
                         int64_t hidden, int64_t num_chosen) {
#pragma omp parallel for schedule(static) if (rows > FEW_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        memcpy(out + row * hidden, x + row * hidden, sizeof(float) * (size_t)hidden);
        for (int64_t slot = row * num_chosen; slot < (row + 1) * num_chosen; slot++)
            for (int64_t i = 0; i < hidden; i++) out[row * hidden + i] += expert_weights[slot] * bias[expert_ids[slot] * hidden + i];
    }
}

/* --- attention ------------------------------------------------------------------------------------------------------------------------ */

/* The keys or values of one head that a query sees, in a paged cache. */
typedef struct {
    const uint8_t *values;
    int kind;
    size_t head_dim;
    int64_t num;
    const size_t *places; /* bytes from `values` to each of them */
} Pages;

/* Slots of positions [at, at + num) from the table's start on, in bytes. */
static void find_places(const int64_t *table, int64_t block_size, int64_t at, int64_t num, size_t slot_bytes, size_t *places) {
    int64_t block = at / block_size, offset = at % block_size;
    for (int64_t i = 0; i < num; i++, offset++) {
        if (offset == block_size) block++, offset = 0;
        places[i] = (size_t)(table[block] * block_size + offset) * slot_bytes;
    }
}

/* What comes PLACES_AHEAD later: keys and values lie scattered, where the hardware foresees nothing. */
INLINE void prefetch(const Pages *pages, int64_t i) {
    if (i + PLACES_AHEAD >= pages->num) return;
    const uint8_t *const row = pages->values + pages->places[i + PLACES_AHEAD];
    for (size_t byte = 0; byte < pages->head_dim * (pages->kind == BF16 ? 2 : 4); byte += 64) __builtin_prefetch(row + byte);
}

/* scores[h * stride + i] = scale * q[h] . key i, and -infinity for i in [num, stride). */
static void score(const Pages *keys, const float *const *q, int heads, float scale, float *scores, int64_t stride) {
    float sums[TILE_ROWS][TILE_OUTS];
    const int64_t num = keys->num;
    for (int64_t i = 0; i < num; i += TILE_OUTS) {
        const uint8_t *rows[TILE_OUTS];
        const int64_t seen = least(num - i, TILE_OUTS);
        for (int64_t o = 0; o < TILE_OUTS; o++) rows[o] = keys->values + keys->places[i + least(o, seen - 1)], prefetch(keys, i + o);
        for (int head = 0; head < heads; head += TILE_ROWS) {
            const int num_heads = (int)least(heads - head, TILE_ROWS);
            (keys->kind == BF16 ? tile_BF16 : tile_F32)(num_heads, keys->head_dim, q + head, rows, rows, sums);
            for (int h = 0; h < num_heads; h++)
                for (int64_t o = 0; o < seen; o++) scores[(head + h) * stride + i + o] = scale * sums[h][o];
        }
    }
    for (int head = 0; head < heads; head++)
        for (int64_t i = num; i < stride; i++) scores[head * stride + i] = -INFINITY;
}

/* Softmax over the sink and `stride` scores, a multiple of LANES, in place and without the sink:
 * exp(s - c) / (exp(sink - c) + sum of exp(s - c)) with c the largest of all. */
static void softmax(float *scores, int64_t stride, float sink) {
    float tops[LANES], totals[LANES] = {0}, sums[TILE_OUTS], top = sink;
    for (int lane = 0; lane < LANES; lane++) tops[lane] = sink;
    for (int64_t i = 0; i < stride; i += LANES)
        for (int lane = 0; lane < LANES; lane++) tops[lane] = scores[i + lane] > tops[lane] ? scores[i + lane] : tops[lane];
    for (int lane = 0; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
    for (int64_t i = 0; i < stride; i++) scores[i] = exponential(scores[i] - top);
    for (int64_t i = 0; i < stride; i += LANES)
        for (int lane = 0; lane < LANES; lane++) totals[lane] += scores[i + lane];
    sum4(load(totals), zero(), zero(), zero(), sums);
    const float total = sums[0] + exponential(sink - top);
    for (int64_t i = 0; i < stride; i++) scores[i] /= total;
}

/* out[h * head_dim + column ...] = sum over i of weights[h * stride + i] * value i, in the order of i, for 16 columns or fewer. */
INLINE void mix_columns(const Pages *values, const float *weights, int64_t stride, int heads, size_t column, float *out) {
    lanes total[4];
    const size_t columns = (size_t)least((int64_t)(values->head_dim - column), LANES);
    UNROLL for (int h = 0; h < heads; h++) total[h] = zero();
    for (int64_t i = 0; i < values->num; i++) {
        const uint8_t *const row = values->values + values->places[i];
        if (column == 0) prefetch(values, i);
        lanes value, nothing;
        if (columns < LANES)
            load_rest(values->kind, row, column, values->head_dim, &value, &nothing);
        else
            value = values->kind == BF16 ? load_bf16((const uint16_t *)row + column) : load((const float *)row + column);
        UNROLL for (int h = 0; h < heads; h++) total[h] = fma16(spread(weights[h * stride + i]), value, total[h]);
    }
    UNROLL for (int h = 0; h < heads; h++) {
        float sums[LANES];
        store(sums, total[h]);
        memcpy(out + (size_t)h * values->head_dim + column, sums, sizeof(float) * columns);
    }
}

static void mix(const Pages *values, const float *weights, int64_t stride, int heads, float *out) {
    for (int head = 0, step; head < heads; head += step) {
        step = heads - head >= 4 ? 4 : 1;
        for (size_t column = 0; column < values->head_dim; column += LANES) {
            const float *const own = weights + head * stride;
            float *const to = out + (size_t)head * values->head_dim;
            if (step == 4)
                mix_columns(values, own, stride, 4, column, to);
            else
                mix_columns(values, own, stride, 1, column, to);
        }
    }
}

/* queries and out [rows, heads, head_dim] float32; caches [blocks, block_size, kv_heads, head_dim] float32 or bfloat16; sinks [heads].
 * Sequence s has the rows from query_starts[s] to query_starts[s + 1], its last row stands at context_lens[s] - 1, and its blocks are
 * block_tables[s * table_width ...] for positions from table_starts[s] on. A query sees positions up to its own, with `window` > 0 the last
 * `window` of them. Returns 0, or 1 where there is not enough memory. */
int ossia_attention(const float *queries, const void *keys, const void *values, int is_bf16, const float *sinks, const int64_t *query_starts,
                    const int64_t *context_lens, const int64_t *table_starts, const int64_t *block_tables, float *out, int64_t sequences,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t table_width, int64_t window, float scale) {
    const int64_t rows = query_starts[sequences], group = heads / kv_heads;
    int64_t *const owners = malloc(sizeof(int64_t) * (size_t)rows);
    if (!owners) return 1;
    int64_t longest = 0;
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        longest = context_lens[sequence] > longest ? context_lens[sequence] : longest;
        for (int64_t row = query_starts[sequence]; row < query_starts[sequence + 1]; row++) owners[row] = sequence;
    }
    if (window) longest = least(longest, window);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *const scores = malloc(sizeof(float) * (size_t)((longest + LANES) * group));
        const float **const q = malloc(sizeof(float *) * (size_t)group);
        size_t *const places = malloc(sizeof(size_t) * (size_t)longest);
        failed = !scores || !q || !places;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < rows * kv_heads; item++) {
            if (failed) continue;
            const int64_t row = item / kv_heads, kv_head = item % kv_heads, sequence = owners[row];
            const int64_t position = context_lens[sequence] - query_starts[sequence + 1] + row;
            const int64_t first = window && position >= window ? position - window + 1 : 0, num = position + 1 - first;
            const int64_t at = first - table_starts[sequence], stride = (num + LANES - 1) / LANES * LANES;
            const size_t head_bytes = (size_t)head_dim * (is_bf16 ? 2 : 4), query = (size_t)((row * heads + kv_head * group) * head_dim);
            Pages pages = {(const uint8_t *)keys + (size_t)kv_head * head_bytes, is_bf16 ? BF16 : F32, (size_t)head_dim, num, places};
            find_places(block_tables + sequence * table_width, block_size, at, num, (size_t)kv_heads * head_bytes, places);
            for (int64_t h = 0; h < group; h++) q[h] = queries + query + h * head_dim;
            score(&pages, q, (int)group, scale, scores, stride);
            for (int64_t h = 0; h < group; h++) softmax(scores + h * stride, stride, sinks[kv_head * group + h]);
            pages.values = (const uint8_t *)values + (size_t)kv_head * head_bytes;
            mix(&pages, scores, stride, (int)group, out + query);
        }
        free(scores), free(q), free(places);
    }
    free(owners);
    return failed;
}

/* --- what lies between ---------------------------------------------------------------------------------------------------------------- */

/* totals = x + residual (NULL: x), normed = totals / sqrt(mean(totals^2) + eps) * weight; all [rows, hidden]. */
void ossia_add_rms_norm(const float *x, const float *residual, const float *weight, float eps, float *normed, float *totals, int64_t rows,
                        int64_t hidden) {
#pragma omp parallel for schedule(static) if (rows > FEW_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const float *const own = x + row * hidden;
        float *const total = totals + row * hidden, *const out = normed + row * hidden;
        float squares[LANES] = {0}, sums[TILE_OUTS];
        for (int64_t i = 0; i < hidden; i++) total[i] = residual ? own[i] + residual[row * hidden + i] : own[i];
        for (int64_t i = 0; i < hidden; i += LANES)
            for (int64_t lane = 0; lane < least(LANES, hidden - i); lane++) squares[lane] += total[i + lane] * total[i + lane];
        sum4(load(squares), zero(), zero(), zero(), sums);
        const float factor = 1 / sqrtf(sums[0] / (float)hidden + eps);
        for (int64_t i = 0; i < hidden; i++) out[i] = total[i] * factor * weight[i];
    }
}

/* Pairs (i, i + half) of each head turned by their angles. */
static void rotate(const float *x, const float *cosines, const float *sines, int64_t heads, int64_t half, float *out) {
    for (int64_t head = 0; head < heads; head++, x += 2 * half, out += 2 * half)
        for (int64_t i = 0; i < half; i++) {
            const float first = x[i], second = x[half + i];
            out[i] = first * cosines[i] - second * sines[i];
            out[half + i] = second * cosines[i] + first * sines[i];
        }
}

/* q [rows, heads, head_dim] -> turned [rows, heads, head_dim]; k turned and v [rows, kv_heads, head_dim] go to their slots of the caches
 * [slots, kv_heads, head_dim]. Rows of q, k and v lie so many elements apart; cosines and sines [rows, head_dim / 2]. */
void ossia_rotate_and_store(const float *q, const float *k, const float *v, const float *cosines, const float *sines, float *turned,
                            float *key_cache, float *value_cache, const int64_t *slots, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                            int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t half = head_dim / 2, width = kv_heads * head_dim;
    for (int64_t row = 0; row < rows; row++) {
        const float *const cosine = cosines + row * half, *const sine = sines + row * half;
        rotate(q + row * q_stride, cosine, sine, heads, half, turned + row * heads * head_dim);
        rotate(k + row * k_stride, cosine, sine, kv_heads, half, key_cache + slots[row] * width);
        memcpy(value_cache + slots[row] * width, v + row * v_stride, sizeof(float) * (size_t)width);
    }
}

const char *const ossia_vectors = NAME;
