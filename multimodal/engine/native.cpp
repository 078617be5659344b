// One token in each of many rows of a fused model, in a single call: what `multimodal.engine.native` compiles and calls.
// Rows of one slot, in the order of their positions, are a piece of a prompt: each sees those before it.
//
// What it does: the whole decode step (embedding, gated cross-attention blocks, decoder layers, head) on weights that
// lie in tiles of 16 outputs, in int8, int4 or bfloat16. What it does not know: requests, sampling, pictures' pixels.
// What always holds: a row's result hangs on that row alone, bit for bit, whatever rows stand beside it and however
// many threads there are; a row without a region token in sight passes a block untouched. Nothing here is static:
// calls with different workspaces may run at the same time.
//
// Axes: B rows (up to 32 at a time), D width, H heads, K key/value heads, C width of a head, F width of the feed-forward,
// P positions and S region tokens of a slot. Inputs of a matrix are padded to 64 and outputs to 16, with zeros.
//
// Layout of a matrix (N outputs, K inputs), tile by tile of 16 outputs; `plain` is read by loops that any compiler
// vectorises, `interleaved` by the dot-product instructions of AVX-512 and, but for bfloat16, by AVX2:
//
//   kind      plain                          interleaved                        scales
//   int8      [K][16]                        [K/4][16][4]                       float32 [16] per tile
//   int4      [K/2][16], 2k low, 2k+1 high   [K/8][16][4], 8k+j low, 8k+4+j high   float16 [K/32][2][16]: step, minimum
//   bfloat16  [K][16]                        [K/2][16][2]                       none
//
// An int8 code is weight / scale + 128, unsigned. An int4 weight is code * step + minimum, in groups of 32 inputs.
// Interleaved integer kernels multiply with activations that are rounded to int8, each group of 64 (int4: 32) inputs
// with its own scale; plain ones with float32 activations.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(MULTIMODAL_PORTABLE)
#define WITH_VNNI 1
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(WITH_VNNI) && !defined(MULTIMODAL_PORTABLE)
#define WITH_AVX2 1
#include <immintrin.h>
#endif
#if defined(WITH_VNNI) && defined(__AVX512BF16__)
#define WITH_BF16 1
#endif
#if defined(WITH_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define WITH_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using bfloat16 = uint16_t;  // its bits

// What is done row after row stands in functions of its own: inlined, a compiler makes several copies of a loop's body
// (the last row's, say) that round differently.
#if defined(__GNUC__)
#define OWN_FUNCTION __attribute__((noinline))
#else
#define OWN_FUNCTION
#endif

constexpr int kRows = 32;     // rows that one pass over the weights serves
#ifdef WITH_VNNI
constexpr int kBlock = 14;    // rows that a kernel takes at a time: as many as registers allow
#else
constexpr int kBlock = 4;
#endif
constexpr int kTile = 16;     // outputs of a tile
constexpr int kAhead = 4096;  // bytes between the weights that are read and those that are called into the second cache
constexpr int kAmxRows = 4;   // rows from which on AMX is faster
constexpr int kInputs = 64;   // inputs are padded to a multiple of it; group of int8 activations
constexpr int kGroup = 32;    // group of int4 weights

enum Kind : int64_t { kInt8 = 0, kInt4 = 1, kBfloat16 = 2 };

// ---- what Python passes (ctypes structures of the same names)

struct Linear {
  const uint8_t* tiles;
  const void* scales;         // null for bfloat16
  const float* input_weight;  // (inputs,): a norm's weight, multiplied into the activations; null for ones
  int64_t kind;
  int64_t inputs, outputs;  // padded
};

struct Layer {          // a decoder layer, or a cross-attention block with queries alone in `qkv`
  Linear qkv, o, gate_up, down;  // gate_up: all of gate, then all of up, both padded to a multiple of 16
  const float* attention_gate;   // (D,) weight of a dynamic gate, then its bias; null for a static gate
  const float* feed_forward_gate;
};

struct Model {
  int64_t width, heads, kv_heads, head_dim;
  int64_t cross_heads, cross_kv_heads, cross_head_dim;
  int64_t layer_count, block_count, slots, positions, regions;
  int64_t query_norm;          // 1: queries of the blocks are normalised
  int64_t embedding_is_float;  // 1: float32, 0: bfloat16
  double eps;
  const Layer* layers;
  const Layer* blocks;
  const int64_t* block_at;  // (layer_count,): index of the block before a layer, or -1
  Linear head;
  const void* embedding;        // (V, D)
  bfloat16 *keys, *values;      // (layer_count, slots, K, P, C)
  const bfloat16 *cross_keys, *cross_values;  // (block_count, slots, K, S, C)
  const float *cos, *sin;       // (P, C); the sign of rotate-half is in the sine
};

struct Row {
  int64_t slot, token, position;
  int64_t first_region, end_region;  // region tokens that the row sees; none where they are equal
};

// ---- numbers

inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline bfloat16 narrow(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t half) {  // of normal numbers and zero; what lies below 2^-14 becomes zero
  const uint32_t exponent = (half >> 10) & 31, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t bits = exponent ? sign | (exponent + 112) << 23 | static_cast<uint32_t>(half & 1023) << 13 : sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// exp as compilers vectorise it: 2^n from the exponent bits times a polynomial (Cephes expf); error below 2 ulp.
inline float fast_exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// ---- memory

// Rows of numbers, each aligned to 64 bytes.
template <class T>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t width)
      : stride_((width * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 / static_cast<int64_t>(sizeof(T))),
        data_(static_cast<T*>(::operator new(rows * stride_ * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data_), 0, rows * stride_ * sizeof(T));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(Buffer&& other) noexcept : stride_(other.stride_), data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  T* operator[](int64_t row) { return data_ + row * stride_; }
  const T* operator[](int64_t row) const { return data_ + row * stride_; }

 private:
  int64_t stride_;
  T* data_;
};

// What one thread makes of the inputs of a matrix, in the form that the matrix' kernel wants.
struct Activations {
  explicit Activations(int64_t inputs, int64_t scores)
      : normed(kRows, inputs),
        values(kRows, inputs),
        codes(kRows, inputs),
        scales(kRows, inputs / kGroup),
        sums(kRows, inputs / kGroup),
        halves(kRows, inputs),
        scores(1, scores) {}
  Buffer<float> normed;    // after the norm, before its weight: what gates look at
  Buffer<float> values;    // (B, inputs), the norm's weight in them
  Buffer<int8_t> codes;    // values / scales, rounded
  Buffer<float> scales;    // (B, groups)
  Buffer<int32_t> sums;    // (B, groups): sum of the codes
  Buffer<bfloat16> halves; // values in bfloat16
  Buffer<float> scores;    // attention scores of one key/value head
  bool with_amx = false;   // its registers are set up
};

inline void pause_thread(int spins) {
  if (spins > 4096) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// A phase is a number of parts, a range of them for each thread, which claims them one by one, and then those that other
// threads have not come to: so what a thread reads lies in one stretch of memory, and nobody waits for a thread that the
// system has stopped. It is over when all are done, so whatever a thread reads while it holds a part cannot change: later
// phases wait. A thread that comes late finds nothing left to do and delays nobody.
class alignas(128) Phase {
 public:
  explicit Phase(int64_t threads) : next_(new std::atomic<int64_t>[threads]) { reset(threads); }
  void reset(int64_t threads) {
    threads_ = threads;
    for (int64_t i = 0; i < threads; i++) next_[i].store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  // Calls `work` for parts, and `prepare` before the first one.
  template <class Prepare, class Work>
  void run(int64_t thread, int64_t parts, Prepare prepare, Work work) {
    bool ready = false;
    for (int64_t turn = 0; turn < threads_; turn++) {
      const int64_t owner = (thread + turn) % threads_;
      const int64_t begin = parts * owner / threads_, end = parts * (owner + 1) / threads_;
      for (int64_t part; (part = begin + next_[owner].fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (!ready) prepare();
        ready = true;
        work(part);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < parts; spins++) pause_thread(spins);
  }

 private:
  int64_t threads_ = 0;
  std::unique_ptr<std::atomic<int64_t>[]> next_;
  std::atomic<int64_t> done_{0};
};

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

int64_t largest_inputs(const Model& model) {
  int64_t most = model.head.inputs;
  for (int64_t i = 0; i < model.layer_count + model.block_count; i++) {
    const Layer& layer = i < model.layer_count ? model.layers[i] : model.blocks[i - model.layer_count];
    for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
      most = std::max(most, linear->inputs);
  }
  return most;
}

int64_t largest_qkv(const Model& model) {
  int64_t most = 0;
  for (int64_t i = 0; i < model.layer_count; i++) most = std::max(most, model.layers[i].qkv.outputs);
  for (int64_t i = 0; i < model.block_count; i++) most = std::max(most, model.blocks[i].qkv.outputs);
  return most;
}

// AMX is there, and the kernel lets this process use it.
bool may_use_amx() {
#ifdef WITH_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// All that a step writes to, but for the cache and the logits.
struct Workspace {
  Workspace(const Model& model, int64_t threads)
      : inputs(largest_inputs(model)),
        states(kRows, inputs),
        qkv(kRows, largest_qkv(model)),
        attended(kRows, inputs),
        hidden(kRows, inputs) {
    const int64_t group =
        std::max(model.heads / model.kv_heads, model.cross_heads / std::max<int64_t>(model.cross_kv_heads, 1));
    const int64_t looked = std::max(model.positions, model.regions) + kTile;
    for (int64_t i = 0; i < threads; i++) activations.emplace_back(inputs, group * looked);
    for (int64_t i = 0; i < (model.layer_count + model.block_count) * 6 + 2; i++) phases.emplace_back(threads);
  }
  int64_t inputs;
  Buffer<float> states;    // (B, D): the residual stream
  Buffer<float> qkv;       // (B, (H + 2K) * C)
  Buffer<float> attended;  // (B, H * C)
  Buffer<float> hidden;    // (B, F)
  float attention_weight[kRows], feed_forward_weight[kRows];  // of a block's dynamic gates
  std::deque<Phase> phases;
  std::vector<Activations> activations;  // one for each thread
  bool with_amx = may_use_amx();
};

// ---- activations

#ifdef WITH_VNNI
template <int GROUP>
void quantise(const float* values, int64_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t g = 0; g < inputs / GROUP; g++, values += GROUP, codes += GROUP) {
    __m512 loaded[GROUP / 16], largest = _mm512_setzero_ps();
    for (int i = 0; i < GROUP / 16; i++) {
      loaded[i] = _mm512_loadu_ps(values + i * 16);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(loaded[i]));
    }
    const float scale = std::max(_mm512_reduce_max_ps(largest), 1e-20f) / 127;
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < GROUP / 16; i++) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(loaded[i], inverse));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * 16), _mm512_cvtepi32_epi8(rounded));
    }
    scales[g] = scale;
    sums[g] = _mm512_reduce_add_epi32(sum);
  }
}
#elif defined(WITH_AVX2)
template <int GROUP>
void quantise(const float* values, int64_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t g = 0; g < inputs / GROUP; g++, values += GROUP, codes += GROUP) {
    float largest = 1e-20f;
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < GROUP; k++) largest = std::max(largest, std::fabs(values[k]));
    const float scale = largest / 127;
    const __m256 inverse = _mm256_set1_ps(1 / scale);
    alignas(32) int32_t rounded[GROUP];
    for (int k = 0; k < GROUP; k += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + k),
                         _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + k), inverse)));
    int32_t sum = 0;
    for (int k = 0; k < GROUP; k++) codes[k] = static_cast<int8_t>(rounded[k]), sum += rounded[k];
    scales[g] = scale;
    sums[g] = sum;
  }
}
#endif

// Row `row` of the activations, for a matrix, from one row of inputs.
OWN_FUNCTION void prepare_row(Activations& to, int row, const Linear& linear, const float* inputs) {
  float* values = to.values[row];
  if (linear.input_weight)
    for (int64_t k = 0; k < linear.inputs; k++) values[k] = inputs[k] * linear.input_weight[k];
  else
    std::memcpy(values, inputs, linear.inputs * sizeof(float));
#if defined(WITH_VNNI) || defined(WITH_AVX2)
  if (linear.kind == kInt8)
    quantise<kInputs>(values, linear.inputs, to.codes[row], to.scales[row], to.sums[row]);
  else if (linear.kind == kInt4)
    quantise<kGroup>(values, linear.inputs, to.codes[row], to.scales[row], to.sums[row]);
#endif
#ifdef WITH_BF16
  if (linear.kind == kBfloat16)
    for (int64_t k = 0; k < linear.inputs; k++) to.halves[row][k] = narrow(values[k]);
#endif
}

// RMS norm (Zhang and Sennrich, 2019), then as above.
OWN_FUNCTION void prepare_normed(Activations& to, int row, const Linear& linear, const float* states, int64_t width, double eps) {
  const float scale = 1 / std::sqrt(dot(states, states, width) / width + static_cast<float>(eps));
  float* normed = to.normed[row];
  for (int64_t k = 0; k < width; k++) normed[k] = states[k] * scale;
  for (int64_t k = width; k < linear.inputs; k++) normed[k] = 0;
  prepare_row(to, row, linear, normed);
}

// ---- kernels: 16 outputs of 1 to 8 rows from row `first` on, `out` (B, 16)

// out += weights (32, 16) with 32 values of a row.
OWN_FUNCTION void multiply_row(const float* weights, const float* values, float* out) {
#if defined(__GNUC__)  // 16 numbers at once; on processors with shorter registers, several of them
  typedef float Lanes __attribute__((vector_size(kTile * sizeof(float)), aligned(4), may_alias));
  Lanes even = {}, odd = {};
  for (int k = 0; k < kGroup; k += 2) {
    even += *reinterpret_cast<const Lanes*>(weights + k * kTile) * values[k];
    odd += *reinterpret_cast<const Lanes*>(weights + (k + 1) * kTile) * values[k + 1];
  }
  *reinterpret_cast<Lanes*>(out) += even + odd;
#else
  float sums[kTile] = {};
  for (int k = 0; k < kGroup; k++)
    for (int n = 0; n < kTile; n++) sums[n] += weights[k * kTile + n] * values[k];
  for (int n = 0; n < kTile; n++) out[n] += sums[n];
#endif
}

// Any processor, for what has no instructions of its own.
void plain_tile(const Linear& linear, int64_t tile, const Activations& x, int rows, float* out) {
  const int64_t inputs = linear.inputs;
  for (int i = 0; i < rows * kTile; i++) out[i] = 0;
  for (int64_t start = 0; start < inputs; start += kGroup) {
    float weights[kGroup * kTile];
    if (linear.kind == kInt8) {
      const uint8_t* codes = linear.tiles + (tile * inputs + start) * kTile;
      for (int i = 0; i < kGroup * kTile; i++) weights[i] = static_cast<float>(static_cast<int>(codes[i]) - 128);
    } else if (linear.kind == kInt4) {
      const uint8_t* codes = linear.tiles + (tile * inputs + start) * kTile / 2;
      const uint16_t* table =
          static_cast<const uint16_t*>(linear.scales) + (tile * (inputs / kGroup) + start / kGroup) * 2 * kTile;
      float step[kTile], minimum[kTile];
      for (int n = 0; n < kTile; n++) step[n] = half_to_float(table[n]), minimum[n] = half_to_float(table[kTile + n]);
      for (int k = 0; k < kGroup / 2; k++)
        for (int n = 0; n < kTile; n++) {
          const int code = codes[k * kTile + n];
          weights[2 * k * kTile + n] = static_cast<float>(code & 15) * step[n] + minimum[n];
          weights[(2 * k + 1) * kTile + n] = static_cast<float>(code >> 4) * step[n] + minimum[n];
        }
    } else {
      const bfloat16* halves = reinterpret_cast<const bfloat16*>(linear.tiles) + (tile * inputs + start) * kTile;
      for (int i = 0; i < kGroup * kTile; i++) weights[i] = widen(halves[i]);
    }
    for (int row = 0; row < rows; row++) multiply_row(weights, x.values[row] + start, out + row * kTile);
  }
  if (linear.kind == kInt8) {
    const float* scales = static_cast<const float*>(linear.scales) + tile * kTile;
    for (int row = 0; row < rows; row++)
      for (int n = 0; n < kTile; n++) out[row * kTile + n] *= scales[n];
  }
}

#ifdef WITH_VNNI
inline __m512i broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, 4);
  return _mm512_set1_epi32(value);
}

template <int ROWS>
void int8_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile;
  __m512 total[ROWS];
  for (int m = 0; m < ROWS; m++) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < linear.inputs / kInputs; g++, codes += kInputs * kTile) {
    __m512i sum[ROWS];
    for (int m = 0; m < ROWS; m++) sum[m] = _mm512_set1_epi32(-128 * x.sums[first + m][g]);  // the codes' offset
#pragma GCC unroll 16
    for (int i = 0; i < kInputs / 4; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + kAhead), _MM_HINT_T1);
      const __m512i weights = _mm512_loadu_si512(codes + i * 64);
      for (int m = 0; m < ROWS; m++)
        sum[m] = _mm512_dpbusd_epi32(sum[m], weights, broadcast(x.codes[first + m] + g * kInputs + i * 4));
    }
    for (int m = 0; m < ROWS; m++)
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), _mm512_set1_ps(x.scales[first + m][g]), total[m]);
  }
  const __m512 scales = _mm512_loadu_ps(static_cast<const float*>(linear.scales) + tile * kTile);
  for (int m = 0; m < ROWS; m++) _mm512_storeu_ps(out + m * kTile, _mm512_mul_ps(total[m], scales));
}

template <int ROWS>
void int4_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  const int64_t groups = linear.inputs / kGroup;
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile / 2;
  const uint16_t* table = static_cast<const uint16_t*>(linear.scales) + tile * groups * 2 * kTile;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 total[ROWS];
  for (int m = 0; m < ROWS; m++) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++, codes += kGroup * kTile / 2, table += 2 * kTile) {
    __m512i sum[ROWS];
    for (int m = 0; m < ROWS; m++) sum[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < kGroup / 8; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + kAhead), _MM_HINT_T1);
      const __m512i both = _mm512_loadu_si512(codes + i * 64);
      const __m512i even = _mm512_and_si512(both, low), odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      for (int m = 0; m < ROWS; m++) {
        const int8_t* values = x.codes[first + m] + g * kGroup + i * 8;
        sum[m] = _mm512_dpbusd_epi32(sum[m], even, broadcast(values));
        sum[m] = _mm512_dpbusd_epi32(sum[m], odd, broadcast(values + 4));
      }
    }
    const __m512 step = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + kTile)));
    for (int m = 0; m < ROWS; m++) {  // scale * (step * <codes, values> + minimum * <1, values>)
      const __m512 offset = _mm512_mul_ps(minimum, _mm512_set1_ps(static_cast<float>(x.sums[first + m][g])));
      const __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), step, offset);
      total[m] = _mm512_fmadd_ps(product, _mm512_set1_ps(x.scales[first + m][g]), total[m]);
    }
  }
  for (int m = 0; m < ROWS; m++) _mm512_storeu_ps(out + m * kTile, total[m]);
}
#endif

#ifdef WITH_AVX2
// As the kernels above, sum for sum. A tile's 16 outputs are two registers of 8.
inline __m256i broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, 4);
  return _mm256_set1_epi32(value);
}

inline __m256i loaded(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

template <int ROWS>
void int8_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile;
  const __m256i offset = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  __m256 total[ROWS][2] = {};
  for (int64_t g = 0; g < linear.inputs / kInputs; g++, codes += kInputs * kTile) {
    __m256i sum[ROWS][2] = {};
    for (int i = 0; i < kInputs / 4; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + kAhead), _MM_HINT_T1);
      __m256i weights[2], sizes[2];  // the signs go to the activations: pairs of products then fit into 16 bits
      for (int j = 0; j < 2; j++) {
        weights[j] = _mm256_xor_si256(loaded(codes + i * 64 + j * 32), offset);
        sizes[j] = _mm256_abs_epi8(weights[j]);
      }
      for (int m = 0; m < ROWS; m++) {
        const __m256i values = broadcast(x.codes[first + m] + g * kInputs + i * 4);
        for (int j = 0; j < 2; j++) {
          const __m256i pairs = _mm256_maddubs_epi16(sizes[j], _mm256_sign_epi8(values, weights[j]));
          sum[m][j] = _mm256_add_epi32(sum[m][j], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int j = 0; j < 2; j++)
        total[m][j] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][j]), _mm256_set1_ps(x.scales[first + m][g]), total[m][j]);
  }
  const float* scales = static_cast<const float*>(linear.scales) + tile * kTile;
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < 2; j++)
      _mm256_storeu_ps(out + m * kTile + j * 8, _mm256_mul_ps(total[m][j], _mm256_loadu_ps(scales + j * 8)));
}

template <int ROWS>
void int4_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  const int64_t groups = linear.inputs / kGroup;
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile / 2;
  const uint16_t* table = static_cast<const uint16_t*>(linear.scales) + tile * groups * 2 * kTile;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 total[ROWS][2] = {};
  for (int64_t g = 0; g < groups; g++, codes += kGroup * kTile / 2, table += 2 * kTile) {
    __m256i pairs[ROWS][2] = {};  // at most 8 times 2 * 15 * 127: 16 bits hold a group's
    for (int i = 0; i < kGroup / 8; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + kAhead), _MM_HINT_T1);
      for (int j = 0; j < 2; j++) {
        const __m256i both = loaded(codes + i * 64 + j * 32);
        const __m256i even = _mm256_and_si256(both, low), odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int m = 0; m < ROWS; m++) {
          const int8_t* values = x.codes[first + m] + g * kGroup + i * 8;
          pairs[m][j] = _mm256_add_epi16(pairs[m][j], _mm256_maddubs_epi16(even, broadcast(values)));
          pairs[m][j] = _mm256_add_epi16(pairs[m][j], _mm256_maddubs_epi16(odd, broadcast(values + 4)));
        }
      }
    }
    for (int j = 0; j < 2; j++) {
      const auto widened = [&](const uint16_t* halves) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + j * 8)));
      };
      const __m256 step = widened(table), minimum = widened(table + kTile);
      for (int m = 0; m < ROWS; m++) {
        const __m256 offset = _mm256_mul_ps(minimum, _mm256_set1_ps(static_cast<float>(x.sums[first + m][g])));
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[m][j], ones));
        const __m256 product = _mm256_fmadd_ps(sum, step, offset);
        total[m][j] = _mm256_fmadd_ps(product, _mm256_set1_ps(x.scales[first + m][g]), total[m][j]);
      }
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < 2; j++) _mm256_storeu_ps(out + m * kTile + j * 8, total[m][j]);
}
#endif

#ifdef WITH_BF16
template <int ROWS>
void bfloat16_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  constexpr int kChains = 2;  // for any number of rows, so that sums are made in the same order
  const uint8_t* halves = linear.tiles + tile * linear.inputs * kTile * 2;
  __m512 total[ROWS][kChains];
  for (int m = 0; m < ROWS; m++)
    for (int u = 0; u < kChains; u++) total[m][u] = _mm512_setzero_ps();
  for (int64_t k = 0; k < linear.inputs; k += 2 * kChains, halves += 64 * kChains)
    for (int u = 0; u < kChains; u++) {
      _mm_prefetch(reinterpret_cast<const char*>(halves + u * 64 + kAhead), _MM_HINT_T1);
      const __m512bh weights = (__m512bh)_mm512_loadu_si512(halves + u * 64);
      for (int m = 0; m < ROWS; m++)
        total[m][u] = _mm512_dpbf16_ps(total[m][u], weights, (__m512bh)broadcast(x.halves[first + m] + k + 2 * u));
    }
  for (int m = 0; m < ROWS; m++) _mm512_storeu_ps(out + m * kTile, _mm512_add_ps(total[m][0], total[m][1]));
}
#endif

#ifdef WITH_AMX
// AMX registers of 16 rows of 64 bytes; what another library had set is put back, for it may count on it.
class TileRegisters {
 public:
  explicit TileRegisters(int first_rows = 16) {  // of registers 0 and 1
    _tile_storeconfig(&before_);
    Shape ours;
    ours.palette = 1;
    for (int i = 0; i < 8; i++) ours.row_bytes[i] = 64, ours.rows[i] = i < 2 ? first_rows : 16;
    _tile_loadconfig(&ours);
  }
  ~TileRegisters() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }

 private:
  struct alignas(64) Shape {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } before_;
};

// As int8_tile, sum for sum, for up to 16 rows; the registers are set up.
template <int ROWS>
void int8_amx_tile(const Linear& linear, int64_t tile, const Activations& x, int first, float* out) {
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile;
  const int64_t stride = x.codes[1] - x.codes[0];
  alignas(64) int32_t sums[kTile * kTile] = {};
  __m512 total[ROWS];
  for (int m = 0; m < ROWS; m++) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < linear.inputs / kInputs; g++, codes += kInputs * kTile) {
    for (int i = 0; i < kInputs / 4; i++)
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + kAhead), _MM_HINT_T1);
    _tile_zero(0);
    _tile_loadd(1, x.codes[first] + g * kInputs, stride);
    _tile_loadd(2, codes, 64);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, sums, 64);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const __m512i offset = _mm512_set1_epi32(128 * x.sums[first + m][g]);  // the codes' offset
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + m * kTile), offset);
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scales[first + m][g]), total[m]);
    }
  }
  const __m512 scales = _mm512_loadu_ps(static_cast<const float*>(linear.scales) + tile * kTile);
  for (int m = 0; m < ROWS; m++) _mm512_storeu_ps(out + m * kTile, _mm512_mul_ps(total[m], scales));
}
#endif

bool interleaved([[maybe_unused]] int64_t kind) {
#ifdef WITH_BF16
  if (kind == kBfloat16) return true;
#endif
#if defined(WITH_VNNI) || defined(WITH_AVX2)
  if (kind != kBfloat16) return true;
#endif
  return false;
}

// Calls a kernel, which is compiled for each number of rows, with that number.
template <int MOST, class Kernel>
inline void call_for(int rows, Kernel kernel) {
  if constexpr (MOST > 1)
    if (rows < MOST) return call_for<MOST - 1>(rows, kernel);
  kernel(std::integral_constant<int, MOST>());
}

// Calls a kernel for all rows, in equal parts, as few as it can: for each, a tile's weights are read once.
template <class Kernel>
inline void in_parts(int rows, Kernel kernel) {
  const int part = static_cast<int>(divided(rows, divided(rows, kBlock)));
  for (int first = 0; first < rows; first += part)
    call_for<kBlock>(std::min(part, rows - first), [&](auto count) { kernel(count, first); });
}

void multiply_tile(const Linear& linear, int64_t tile, const Activations& x, int rows, float* out) {
#ifdef WITH_AMX
  if (linear.kind == kInt8 && x.with_amx && rows >= kAmxRows) {
    for (int first = 0; first < rows; first += kTile, out += kTile * kTile)
      switch (std::min((rows - first + 3) / 4, 4)) {
        case 1: int8_amx_tile<4>(linear, tile, x, first, out); break;
        case 2: int8_amx_tile<8>(linear, tile, x, first, out); break;
        case 3: int8_amx_tile<12>(linear, tile, x, first, out); break;
        default: int8_amx_tile<kTile>(linear, tile, x, first, out);
      }
    return;
  }
#endif
#if defined(WITH_VNNI) || defined(WITH_AVX2)
  if (linear.kind == kInt8)
    return in_parts(rows, [&](auto count, int first) { int8_tile<count()>(linear, tile, x, first, out + first * kTile); });
  if (linear.kind == kInt4)
    return in_parts(rows, [&](auto count, int first) { int4_tile<count()>(linear, tile, x, first, out + first * kTile); });
#endif
#ifdef WITH_BF16
  if (linear.kind == kBfloat16)
    return in_parts(rows, [&](auto count, int first) { bfloat16_tile<count()>(linear, tile, x, first, out + first * kTile); });
#endif
  plain_tile(linear, tile, x, rows, out);
}

// ---- attention

// `group` queries that share one key/value head over `count` cached positions. WIDTH is C where it is known, else 0.
template <int WIDTH>
void attend(const float* queries, const bfloat16* keys, const bfloat16* values, int64_t group, int64_t count,
            int64_t head_dim, float* scores, float* out) {
  const int64_t width = WIDTH ? WIDTH : head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  float wide_fixed[WIDTH ? WIDTH : 1024];
  float* wide = wide_fixed;
  std::vector<float> wide_large;
  if (!WIDTH && width > 1024) {
    wide_large.resize(width);
    wide = wide_large.data();
  }
  for (int64_t t = 0; t < count; t++) {
    for (int64_t c = 0; c < width; c++) wide[c] = widen(keys[t * width + c]);
    for (int64_t g = 0; g < group; g++) scores[g * count + t] = dot(queries + g * width, wide, width) * scale;
  }
  for (int64_t g = 0; g < group; g++) {
    float* row = scores + g * count;
    float largest = row[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t t = 0; t < count; t++) largest = row[t] > largest ? row[t] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < count; t++) {
      row[t] = fast_exp(row[t] - largest);
      total += row[t];
    }
    const float inverse = 1 / total;
    for (int64_t t = 0; t < count; t++) row[t] *= inverse;
  }
  for (int64_t i = 0; i < group * width; i++) out[i] = 0;
  for (int64_t t = 0; t < count; t++) {
    for (int64_t c = 0; c < width; c++) wide[c] = widen(values[t * width + c]);
    for (int64_t g = 0; g < group; g++) {
      const float weight = scores[g * count + t];
      float* sum = out + g * width;
      for (int64_t c = 0; c < width; c++) sum[c] += weight * wide[c];
    }
  }
}

void attend_any(const float* queries, const bfloat16* keys, const bfloat16* values, int64_t group, int64_t count,
                int64_t head_dim, float* scores, float* out) {
  if (head_dim == 64)
    attend<64>(queries, keys, values, group, count, head_dim, scores, out);
  else if (head_dim == 128)
    attend<128>(queries, keys, values, group, count, head_dim, scores, out);
  else
    attend<0>(queries, keys, values, group, count, head_dim, scores, out);
}

// Rotary positions (Su et al., 2021, section 3.4.2) with halves as partners, in place.
void rotate(float* head, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; c++) {
    const float first = head[c], second = head[c + half];
    head[c] = first * cos[c] + second * sin[c];
    head[c + half] = second * cos[c + half] + first * sin[c + half];
  }
}

// ---- the step

// SwiGLU (Shazeer, 2020)
OWN_FUNCTION void activate_tile(const float* gate, const float* up, float* out) {
  for (int n = 0; n < kTile; n++) out[n] = gate[n] * up[n] / (1 + fast_exp(-gate[n]));
}

OWN_FUNCTION void add_tile(float* states, float weight, const float* values) {
  for (int n = 0; n < kTile; n++) states[n] += weight * values[n];
}

// A dynamic gate: sigmoid(<weight, normed> + bias), the bias behind the weight.
OWN_FUNCTION float gate_weight(const float* gate, const float* normed, int64_t width) {
  return 1 / (1 + std::exp(-(dot(gate, normed, width) + gate[width])));
}

// Up to 32 rows through the model, as one thread sees it.
class Pass {
 public:
  Pass(const Model& model, Workspace& space, int thread, const Row* rows, int count)
      : model_(model), space_(space), thread_(thread), x_(space.activations[thread]), rows_(rows), count_(count) {
    for (int row = 0; row < count; row++) {
      all_[row] = row;
      for (int other = 0; other < row; other++) shared_ |= rows[other].slot == rows[row].slot;
      if (rows[row].first_region < rows[row].end_region) seeing_[seeing_count_++] = row;
    }
  }

  // `logits` are those of the rows from `first` on.
  void forward(float* logits, int64_t stride, int first) {
    embed();
    for (int64_t index = 0; index < model_.layer_count; index++) {
      const int64_t block = model_.block_at[index];
      if (block >= 0 && seeing_count_) layer(model_.blocks[block], seeing_, seeing_count_, 0, block, true);
      layer(model_.layers[index], all_, count_, index + 1 < model_.layer_count ? 0 : first, index, false);
    }
    const int wanted = count_ - first;
    if (wanted <= 0) return;
    const Linear& head = model_.head;
    const int64_t tiles = head.outputs / kTile, at_once = 32;
    run(
        divided(tiles, at_once), [&] { normalise(head, all_ + first, wanted); },
        [&](int64_t part) {
          for (int64_t tile = part * at_once; tile < std::min(tiles, (part + 1) * at_once); tile++) {
            float out[kRows * kTile];
            multiply_tile(head, tile, x_, wanted, out);
            for (int i = 0; i < wanted; i++)
              std::memcpy(logits + i * stride + tile * kTile, out + i * kTile, sizeof(float) * kTile);
          }
        });
  }

 private:
  template <class Prepare, class Work>
  void run(int64_t parts, Prepare prepare, Work work) {
    space_.phases[phase_++].run(thread_, parts, prepare, work);
  }

  void embed() {
    const int64_t width = model_.width;
    run(
        count_, [] {},
        [&](int64_t row) {
          float* states = space_.states[row];
          const int64_t start = rows_[row].token * width;
          if (model_.embedding_is_float)
            std::memcpy(states, static_cast<const float*>(model_.embedding) + start, width * sizeof(float));
          else
            for (int64_t k = 0; k < width; k++)
              states[k] = widen(static_cast<const bfloat16*>(model_.embedding)[start + k]);
          for (int64_t k = width; k < space_.inputs; k++) states[k] = 0;
        });
  }

  // A decoder layer, or a block over those rows (their indices in `rows`) that see a picture. Of the first `unread` rows
  // nobody reads more than keys and values.
  void layer(const Layer& layer, const int* rows, int count, int unread, int64_t index, bool cross) {
    const int64_t tiles = layer.qkv.outputs / kTile, at_once = 4;
    run(
        divided(tiles, at_once), [&] { normalise(layer.qkv, rows, count); },
        [&](int64_t part) {
          if (part == 0) weigh(layer.attention_gate, count, space_.attention_weight);
          for (int64_t tile = part * at_once; tile < std::min(tiles, (part + 1) * at_once); tile++) {
            float out[kRows * kTile];
            multiply_tile(layer.qkv, tile, x_, count, out);
            for (int i = 0; i < count; i++)
              std::memcpy(space_.qkv[rows[i]] + tile * kTile, out + i * kTile, sizeof(float) * kTile);
          }
        });
    const int64_t heads = cross ? model_.cross_kv_heads : model_.kv_heads;
    if (shared_ && !cross)  // a row reads what the others of its slot write
      run(
        count * heads, [] {}, [&](int64_t part) { write(rows[part / heads], part % heads, index); });
    if (shared_) rows += unread, count -= unread;
    if (count == 0) return;
    run(
        count * heads, [] {},
        [&](int64_t part) {
          const int row = rows[part / heads];
          if (!cross && !shared_) write(row, part % heads, index);
          cross ? cross_attention(row, part % heads, index) : self_attention(row, part % heads, index);
        });
    add(layer.o, space_.attended, rows, count, layer.attention_gate ? space_.attention_weight : nullptr);
    const int64_t half = layer.gate_up.outputs / kTile / 2;
    run(
        divided(half, at_once), [&] { normalise(layer.gate_up, rows, count); },
        [&](int64_t part) {
          if (part == 0) weigh(layer.feed_forward_gate, count, space_.feed_forward_weight);
          for (int64_t tile = part * at_once; tile < std::min(half, (part + 1) * at_once); tile++) {
            float gate[kRows * kTile], up[kRows * kTile];
            multiply_tile(layer.gate_up, tile, x_, count, gate);
            multiply_tile(layer.gate_up, half + tile, x_, count, up);
            for (int i = 0; i < count; i++)
              activate_tile(gate + i * kTile, up + i * kTile, space_.hidden[rows[i]] + tile * kTile);
          }
        });
    add(layer.down, space_.hidden, rows, count, layer.feed_forward_gate ? space_.feed_forward_weight : nullptr);
  }

  void normalise(const Linear& linear, const int* rows, int count) {
    for (int i = 0; i < count; i++)
      prepare_normed(x_, i, linear, space_.states[rows[i]], model_.width, model_.eps);
  }

  // Each row's weight by a dynamic gate.
  void weigh(const float* gate, int count, float* weights) {
    for (int i = 0; gate && i < count; i++) weights[i] = gate_weight(gate, x_.normed[i], model_.width);
  }

  // states += weight * linear(inputs)
  void add(const Linear& linear, const Buffer<float>& inputs, const int* rows, int count, const float* weights) {
    const int64_t tiles = linear.outputs / kTile, at_once = 3;
    run(
        divided(tiles, at_once),
        [&] {
          for (int i = 0; i < count; i++) prepare_row(x_, i, linear, inputs[rows[i]]);
        },
        [&](int64_t part) {
          for (int64_t tile = part * at_once; tile < std::min(tiles, (part + 1) * at_once); tile++) {
            float out[kRows * kTile];
            multiply_tile(linear, tile, x_, count, out);
            for (int i = 0; i < count; i++)
              add_tile(space_.states[rows[i]] + tile * kTile, weights ? weights[i] : 1, out + i * kTile);
          }
        });
  }

  // Where a slot's keys and values of a layer and head begin.
  int64_t start_of(int row, int64_t head, int64_t index) const {
    const int64_t slot = index * model_.slots + rows_[row].slot;
    return (slot * model_.kv_heads + head) * model_.positions * model_.head_dim;
  }

  // Turns queries and key by their position, and puts key and value into the cache.
  void write(int row, int64_t head, int64_t index) {
    const int64_t width = model_.head_dim, group = model_.heads / model_.kv_heads, at = rows_[row].position;
    float* queries = space_.qkv[row] + head * group * width;
    float* key = space_.qkv[row] + (model_.heads + head) * width;
    const float* value = key + model_.kv_heads * width;
    const float *cos = model_.cos + at * width, *sin = model_.sin + at * width;
    for (int64_t g = 0; g < group; g++) rotate(queries + g * width, cos, sin, width);
    rotate(key, cos, sin, width);
    const int64_t to = start_of(row, head, index) + at * width;
    for (int64_t c = 0; c < width; c++) {
      model_.keys[to + c] = narrow(key[c]);
      model_.values[to + c] = narrow(value[c]);
    }
  }

  void self_attention(int row, int64_t head, int64_t index) {
    const int64_t width = model_.head_dim, group = model_.heads / model_.kv_heads;
    const int64_t start = start_of(row, head, index), place = head * group * width;
    attend_any(space_.qkv[row] + place, model_.keys + start, model_.values + start, group, rows_[row].position + 1,
               width, x_.scores[0], space_.attended[row] + place);
  }

  void cross_attention(int row, int64_t head, int64_t index) {
    const int64_t width = model_.cross_head_dim, group = model_.cross_heads / model_.cross_kv_heads;
    const int64_t first = rows_[row].first_region, regions = model_.regions;
    const int64_t start =
        (((index * model_.slots + rows_[row].slot) * model_.cross_kv_heads + head) * regions + first) * width;
    float* queries = space_.qkv[row] + head * group * width;
    if (model_.query_norm)
      for (float* query = queries; query < queries + group * width; query += width) {
        const float scale = 1 / std::sqrt(dot(query, query, width) / width + static_cast<float>(model_.eps));
        for (int64_t c = 0; c < width; c++) query[c] *= scale;
      }
    attend_any(queries, model_.cross_keys + start, model_.cross_values + start, group, rows_[row].end_region - first,
               width, x_.scores[0], space_.attended[row] + head * group * width);
  }

  const Model& model_;
  Workspace& space_;
  int thread_;
  Activations& x_;
  const Row* rows_;
  int count_, seeing_count_ = 0;
  bool shared_ = false;  // some rows have one slot
  int all_[kRows], seeing_[kRows];
  size_t phase_ = 0;
};

// ---- prompts

#ifdef WITH_AMX
// Two tiles widened to bfloat16, each as [inputs / 2][16][2]: an operand of AMX. Of int8, the codes less their offset
// (exact in bfloat16; the scales come last); of int4, the weights.
inline __m512i woven_pair(__m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void widen_tile(const Linear& linear, int64_t tile, bfloat16* out) {
  const __m512i byte = _mm512_set1_epi32(255), nibble = _mm512_set1_epi32(15), offset = _mm512_set1_epi32(128);
  if (linear.kind == kInt8) {
    const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile;
    for (int64_t k = 0; k < linear.inputs; k += 4, codes += 64, out += 64) {
      const __m512i four = _mm512_loadu_si512(codes);
      const auto code = [&](int j) {
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(four, 8 * j), byte), offset));
      };
      _mm512_storeu_si512(out, woven_pair(code(0), code(1)));
      _mm512_storeu_si512(out + 32, woven_pair(code(2), code(3)));
    }
    return;
  }
  const int64_t groups = linear.inputs / kGroup;
  const uint8_t* codes = linear.tiles + tile * linear.inputs * kTile / 2;
  const uint16_t* table = static_cast<const uint16_t*>(linear.scales) + tile * groups * 2 * kTile;
  for (int64_t g = 0; g < groups; g++, table += 2 * kTile) {
    const __m512 step = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + kTile)));
    for (int i = 0; i < kGroup / 8; i++, codes += 64)
      for (int half = 0; half < 2; half++, out += 64) {
        const __m512i four = _mm512_srli_epi32(_mm512_loadu_si512(codes), 4 * half);
        const auto weight = [&](int j) {
          const __m512i code = _mm512_and_si512(_mm512_srli_epi32(four, 8 * j), nibble);
          return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), step, minimum);
        };
        _mm512_storeu_si512(out, woven_pair(weight(0), weight(1)));
        _mm512_storeu_si512(out + 32, woven_pair(weight(2), weight(3)));
      }
  }
}

// 32 outputs (tiles `tile` and the next) of all rows. `x` (rows, inputs) in bfloat16, rows a multiple of 32.
void amx_pair(const Linear& linear, int64_t tile, const bfloat16* x, int64_t rows, bfloat16* wide, bfloat16* out) {
  const int64_t inputs = linear.inputs;
  const bool two = tile + 1 < linear.outputs / kTile;
  const bfloat16* weights[2] = {wide, wide + inputs * kTile};
  for (int j = 0; j < (two ? 2 : 1); j++) {
    if (linear.kind == kBfloat16)
      weights[j] = reinterpret_cast<const bfloat16*>(linear.tiles) + (tile + j) * inputs * kTile;
    else
      widen_tile(linear, tile + j, wide + j * inputs * kTile);
  }
  if (!two) weights[1] = weights[0];
  const int64_t padded = divided(rows, 2 * kTile) * 2 * kTile;
  for (int64_t row = 0; row < padded; row += 2 * kTile) {
    const bool both = row + kTile < rows;
    const bfloat16 *upper = x + row * inputs, *lower = upper + kTile * inputs;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs; k += 32) {
      _tile_loadd(4, upper + k, inputs * 2);
      _tile_loadd(6, weights[0] + k * kTile, 64);
      _tile_loadd(7, weights[1] + k * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, lower + k, inputs * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    alignas(64) float sums[4][kTile * kTile];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int j = 0; j < (two ? 2 : 1); j++) {
      const __m512 scales = linear.kind == kInt8 ? _mm512_loadu_ps(static_cast<const float*>(linear.scales) +
                                                                   (tile + j) * kTile)
                                                 : _mm512_set1_ps(1);
      for (int64_t i = 0; i < std::min<int64_t>(2 * kTile, rows - row); i++) {
        const __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums[i / kTile * 2 + j] + i % kTile * kTile), scales);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (row + i) * linear.outputs + (tile + j) * kTile),
                            (__m256i)_mm512_cvtneps_pbh(sum));
      }
    }
  }
}
#endif

// A matrix as it was, where prompts are read by something else.

// 16 outputs, widened, row by row: (16, inputs) of bfloat16 bits or float32.
template <class T>
void unpack_tile(const Linear& linear, int64_t tile, T* out) {
  const int64_t inputs = linear.inputs;
  const bool woven = interleaved(linear.kind);
  const auto store = [](float value, T* where) {
    if constexpr (sizeof(T) == 2)
      *where = narrow(value);
    else
      *where = value;
  };
  for (int n = 0; n < kTile; n++) {
    T* row = out + n * inputs;
    if (linear.kind == kInt8) {
      const uint8_t* codes = linear.tiles + tile * inputs * kTile;
      const float scale = static_cast<const float*>(linear.scales)[tile * kTile + n];
      for (int64_t k = 0; k < inputs; k += 4)
        for (int j = 0; j < 4; j++)
          store((codes[woven ? k * kTile + n * 4 + j : (k + j) * kTile + n] - 128) * scale, row + k + j);
    } else if (linear.kind == kInt4) {
      const uint8_t* codes = linear.tiles + tile * inputs * kTile / 2;
      const uint16_t* table = static_cast<const uint16_t*>(linear.scales) + tile * (inputs / kGroup) * 2 * kTile + n;
      for (int64_t g = 0; g < inputs / kGroup; g++) {
        const float step = half_to_float(table[g * 2 * kTile]), minimum = half_to_float(table[(g * 2 + 1) * kTile]);
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; k += 8)
          for (int j = 0; j < 4; j++) {
            if (woven) {
              const int code = codes[k / 8 * 64 + n * 4 + j];
              store((code & 15) * step + minimum, row + k + j);
              store((code >> 4) * step + minimum, row + k + 4 + j);
            } else {
              const int code = codes[(k / 2 + j) * kTile + n];
              store((code & 15) * step + minimum, row + k + 2 * j);
              store((code >> 4) * step + minimum, row + k + 2 * j + 1);
            }
          }
      }
    } else {
      const bfloat16* halves = reinterpret_cast<const bfloat16*>(linear.tiles) + tile * inputs * kTile;
      for (int64_t k = 0; k < inputs; k += 2)
        for (int j = 0; j < 2; j++)
          store(widen(halves[woven ? k * kTile + n * 2 + j : (k + j) * kTile + n]), row + k + j);
    }
  }
}

// Step and minimum of each group of 32 that leave the smallest squared error: from ranges between nothing and a third
// narrower than the group's own, codes and a least-squares line through them in turn (as llama.cpp's make_qkx2_quants).
void fit_group(const float* values, float* best_step, float* best_minimum) {
  float low = values[0], high = values[0];
  for (int i = 1; i < kGroup; i++) low = std::min(low, values[i]), high = std::max(high, values[i]);
  *best_step = 1, *best_minimum = low;
  if (high - low < 1e-12f) return;
  float best = INFINITY, total = 0;
  for (int i = 0; i < kGroup; i++) total += values[i];
  const float exact = 1e-5f * (high - low) * (high - low);  // the group came from 4 bits: its line is found
  for (int narrower = 0; narrower <= 10 && best > exact; narrower++) {
    const float cut = 0.015f * static_cast<float>(narrower) * (high - low);
    float step = (high - low - 2 * cut) / 15, minimum = low + cut;
    for (int round = 0; round < 3; round++) {
      const float inverse = 1 / step;
      float sum = 0, squares = 0, products = 0;
      float codes[kGroup];
      for (int i = 0; i < kGroup; i++) {
        const float code = std::min(std::max((values[i] - minimum) * inverse, 0.0f), 15.0f) + 12582912.0f;
        codes[i] = code - 12582912.0f;
      }
#pragma omp simd reduction(+ : sum, squares, products)
      for (int i = 0; i < kGroup; i++) {
        sum += codes[i];
        squares += codes[i] * codes[i];
        products += codes[i] * values[i];
      }
      const float spread = kGroup * squares - sum * sum;
      if (spread <= 0) break;
      step = (kGroup * products - sum * total) / spread;
      minimum = (total - step * sum) / kGroup;
      if (!(step > 0)) break;
      float error = 0;
#pragma omp simd reduction(+ : error)
      for (int i = 0; i < kGroup; i++) {
        const float difference = codes[i] * step + minimum - values[i];
        error += difference * difference;
      }
      if (error < best) best = error, *best_step = step, *best_minimum = minimum;
    }
  }
}

}  // namespace

extern "C" {

// Whether tiles of a kind are interleaved.
int64_t multimodal_interleaved(int64_t kind) { return interleaved(kind); }

// Up to which position of a text its tokens are sooner read as steps, however many they are, than through matrices: by
// `python -m benchmarks.instructions`. The further, the more attention there is, of which a step makes little.
int64_t multimodal_near(int64_t kind) {
  if (may_use_amx() || !interleaved(kind)) return 0;
#ifdef WITH_VNNI
  return 512;
#else
  return 256;
#endif
}

void* multimodal_workspace(const Model* model, int64_t threads) { return new (std::nothrow) Workspace(*model, threads); }

void multimodal_free(void* workspace) { delete static_cast<Workspace*>(workspace); }

// One token in each row; `logits` (wanted, stride) of the last rows, in float32. The workspace is that of this model and
// as many threads.
void multimodal_step(const Model* model, void* workspace, const Row* rows, int64_t count, int64_t wanted, float* logits,
                     int64_t stride, int64_t threads) {
  Workspace& space = *static_cast<Workspace*>(workspace);
  threads = std::min<int64_t>(threads, static_cast<int64_t>(space.activations.size()));
  for (int64_t start = 0; start < count; start += kRows) {
    for (Phase& phase : space.phases) phase.reset(threads);
    const int now = static_cast<int>(std::min<int64_t>(kRows, count - start));
    const int first = static_cast<int>(std::clamp<int64_t>(count - wanted - start, 0, now));
    float* to = first < now ? logits + (start + first - (count - wanted)) * stride : nullptr;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#ifdef _OPENMP
      const int thread = omp_get_thread_num();
#else
      const int thread = 0;
#endif
#ifdef WITH_AMX
      std::optional<TileRegisters> registers;
      const bool with_amx = space.with_amx && now >= kAmxRows;
      space.activations[thread].with_amx = with_amx;
      if (with_amx) registers.emplace(std::min(now, kTile));
#endif
      Pass(*model, space, thread, rows + start, now).forward(to, stride, first);
    }
  }
}

// The matrix (outputs, inputs) as it was before packing, in bfloat16 or (is_float) float32.
void multimodal_unpack(const Linear* linear, void* out, int64_t is_float, int64_t threads) {
  (void)threads;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic, 1)
  for (int64_t tile = 0; tile < linear->outputs / kTile; tile++) {
    const int64_t start = tile * kTile * linear->inputs;
    if (is_float)
      unpack_tile(*linear, tile, static_cast<float*>(out) + start);
    else
      unpack_tile(*linear, tile, static_cast<bfloat16*>(out) + start);
  }
}

// Whether multimodal_linear is there.
int64_t multimodal_has_linear() { return may_use_amx(); }

// Many tokens through a matrix: `x` (rows, width) to `out` (rows, outputs), both bfloat16; width at most its inputs.
void multimodal_linear(const Linear* linear, const void* x, int64_t rows, int64_t width, void* out, int64_t threads) {
#ifdef WITH_AMX
  const int64_t inputs = linear->inputs, pairs = divided(linear->outputs / kTile, 2);
  Buffer<bfloat16> values(divided(rows, 2 * kTile) * 2 * kTile, inputs);  // inputs are a multiple of 64: no gaps
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const bfloat16* from = static_cast<const bfloat16*>(x) + row * width;
      if (linear->input_weight)
        for (int64_t k = 0; k < width; k++) values[row][k] = narrow(widen(from[k]) * linear->input_weight[k]);
      else
        std::memcpy(values[row], from, width * sizeof(bfloat16));
    }
    Buffer<bfloat16> wide(2, inputs * kTile);
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; pair++)
      amx_pair(*linear, pair * 2, values[0], rows, wide[0], static_cast<bfloat16*>(out));
  }
#else
  (void)linear, (void)x, (void)rows, (void)width, (void)out, (void)threads;
#endif
}

// Step and minimum for each of `count` groups of 32 values.
void multimodal_fit(const float* values, int64_t count, float* steps, float* minima, int64_t threads) {
  (void)threads;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic, 256)
  for (int64_t group = 0; group < count; group++) fit_group(values + group * kGroup, steps + group, minima + group);
}

}  // extern "C"
