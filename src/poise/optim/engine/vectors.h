// What generated kernels call in place of the parts of at::vec that go through memory.
//
// A load or store with a count goes through a buffer in two halves, which the processor cannot forward to what follows; a bit
// cast, a narrowing to bytes and a row of indices are scalar loops. Each costs more than the arithmetic around it.
// Where there is no shorter way, these are at::vec's own.

#include <torch/csrc/inductor/cpp_prefix.h>

// x >> places without copies of the sign.
template <int places> inline int32_t poise_shift(int32_t x) { return static_cast<int32_t>(static_cast<uint32_t>(x) >> places); }

#if INDUCTOR_USE_VECTOR_TYPES()
namespace {

template <typename T> using Vec = at::vec::Vectorized<T>;

#if defined(CPU_CAPABILITY_AVX512)
#define POISE_AVX512 1
#elif defined(CPU_CAPABILITY_AVX2)
#define POISE_AVX2 1
#endif

template <typename T> inline Vec<T> poise_load(const void* p, int64_t n) {
  if (n == Vec<T>::size()) return Vec<T>::loadu(p);
#if defined(POISE_AVX2)
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  if (bytes == 8) return Vec<T>(_mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if (bytes == 16) return Vec<T>(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(POISE_AVX512)
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  if (bytes == 16) return Vec<T>(_mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if (bytes == 32) return Vec<T>(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
  return Vec<T>::loadu(p, n);
}

template <typename T, int N> inline at::vec::VectorizedN<T, N> poise_load_n(const void* p, int64_t n) {
  constexpr int size = Vec<T>::size();
  if (n != N * size) return at::vec::VectorizedN<T, N>::loadu(p, n);
  at::vec::VectorizedN<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = Vec<T>::loadu(reinterpret_cast<const T*>(p) + i * size);
  return result;
}

// Bytes and 16-bit floats fill only part of a register.
template <typename V> inline void poise_store(const V& v, void* p, int64_t n) { v.store(p, n); }
template <typename T> inline void poise_store_narrow(const Vec<T>& v, void* p, int64_t n) {
#if defined(POISE_AVX2)
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const __m128i low = _mm256_castsi256_si128(__m256i(v));
  if (bytes == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
  if (bytes == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
#elif defined(POISE_AVX512)
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  if (bytes == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(__m512i(v)));
  if (bytes == 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(__m512i(v)));
#endif
  v.store(p, n);
}
inline void poise_store(const Vec<uint8_t>& v, void* p, int64_t n) { poise_store_narrow(v, p, n); }
inline void poise_store(const Vec<int8_t>& v, void* p, int64_t n) { poise_store_narrow(v, p, n); }
inline void poise_store(const Vec<at::BFloat16>& v, void* p, int64_t n) { poise_store_narrow(v, p, n); }

template <typename To, typename From> inline Vec<To> poise_bits(const Vec<From>& v) { return at::vec::cast<To, From>(v); }
template <typename To, typename From, int N>
inline at::vec::VectorizedN<To, N> poise_bits(const at::vec::VectorizedN<From, N>& v) {
  at::vec::VectorizedN<To, N> result;
  for (int i = 0; i < N; ++i) result[i] = at::vec::cast<To, From>(v[i]);
  return result;
}

// The lowest byte of each entry, as a C cast takes it.
template <typename To> inline Vec<To> poise_bytes(const Vec<int32_t>& v) {
#if defined(POISE_AVX2)
  const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1);
  return Vec<To>(_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(__m256i(v), lowest), lanes));
#elif defined(POISE_AVX512)
  return Vec<To>(_mm512_zextsi128_si512(_mm512_cvtepi32_epi8(__m512i(v))));
#else
  return at::vec::convert<To>(v);
#endif
}
template <typename V> inline Vec<uint8_t> poise_bytes_of(const V& v, uint8_t) { return at::vec::convert<uint8_t>(v); }
template <typename V> inline Vec<int8_t> poise_bytes_of(const V& v, int8_t) { return at::vec::convert<int8_t>(v); }
inline Vec<uint8_t> poise_bytes_of(const Vec<int32_t>& v, uint8_t) { return poise_bytes<uint8_t>(v); }
inline Vec<int8_t> poise_bytes_of(const Vec<int32_t>& v, int8_t) { return poise_bytes<int8_t>(v); }

// The largest entry.
inline int32_t poise_largest(const Vec<int32_t>& v) {
#if defined(POISE_AVX2)
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
#elif defined(POISE_AVX512)
  return _mm512_reduce_max_epi32(__m512i(v));
#else
  using Entries = Vec<int32_t>;
  return at::vec::vec_reduce_all<int32_t>([](Entries& x, Entries& y) { return at::vec::maximum(x, y); }, v);
#endif
}

template <int places> inline Vec<int32_t> poise_shift(const Vec<int32_t>& x) {
#if defined(POISE_AVX2)
  return Vec<int32_t>(_mm256_srli_epi32(__m256i(x), places));
#elif defined(POISE_AVX512)
  return Vec<int32_t>(_mm512_srli_epi32(__m512i(x), places));
#else
  return (x >> Vec<int32_t>(places)) & Vec<int32_t>(static_cast<int32_t>(0xFFFFFFFFu >> places));
#endif
}
template <int places, int N>
inline at::vec::VectorizedN<int32_t, N> poise_shift(const at::vec::VectorizedN<int32_t, N>& x) {
  at::vec::VectorizedN<int32_t, N> result;
  for (int i = 0; i < N; ++i) result[i] = poise_shift<places>(x[i]);
  return result;
}

// first, first + 1, first + 2, ...
inline Vec<int32_t> poise_count(int32_t first) {
#if defined(POISE_AVX2)
  return Vec<int32_t>(_mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
#elif defined(POISE_AVX512)
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return Vec<int32_t>(_mm512_add_epi32(_mm512_set1_epi32(first), places));
#else
  return Vec<int32_t>::arange(first, 1);
#endif
}
template <int N> inline at::vec::VectorizedN<int32_t, N> poise_count_n(int32_t first) {
  at::vec::VectorizedN<int32_t, N> result;
  for (int i = 0; i < N; ++i) result[i] = poise_count(first + i * Vec<int32_t>::size());
  return result;
}

}  // namespace
#endif
