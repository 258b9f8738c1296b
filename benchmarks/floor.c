// The linear recurrence h_t = a_t * h_{t-1} + x_t over [B, T, D] at the speed of memory: each thread takes
// strips of channels and walks through time. Built by scan.py, which measures the others against it.
#include <stddef.h>

enum { STRIP = 256 };

static inline long least(long a, long b) { return a < b ? a : b; }

void forward(const float *restrict x, const float *restrict a, float *restrict y, long B, long T, long D) {
  const long strips = (D + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) schedule(static)
  for (long b = 0; b < B; b++)
    for (long s = 0; s < strips; s++) {
      const long first = s * STRIP, width = least(STRIP, D - first);
      float h[STRIP] = {0};
      for (long t = 0; t < T; t++) {
        const size_t at = ((size_t)b * T + t) * D + first;
        for (long d = 0; d < width; d++) y[at + d] = h[d] = a[at + d] * h[d] + x[at + d];
      }
    }
}

void backward(const float *restrict dy, const float *restrict a, const float *restrict y, float *restrict dx,
              float *restrict da, long B, long T, long D) {
  const long strips = (D + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) schedule(static)
  for (long b = 0; b < B; b++)
    for (long s = 0; s < strips; s++) {
      const long first = s * STRIP, width = least(STRIP, D - first);
      float g[STRIP] = {0};
      for (long t = T - 1; t >= 0; t--) {
        const size_t at = ((size_t)b * T + t) * D + first;
        for (long d = 0; d < width; d++) {
          const float v = dy[at + d] + g[d];
          dx[at + d] = v;
          da[at + d] = t ? v * y[at + d - D] : 0;
          g[d] = a[at + d] * v;
        }
      }
    }
}
