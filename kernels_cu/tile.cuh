// Tiles between global and shared memory: 16 bytes at a time where the strides allow it, else by element.
#pragma once
#include "ptx.cuh"

// Strides in elements; a view may be transposed, broadcast (0) or reversed (negative).
struct Strides {
  int64_t batch, token, head, dim;
};

// tile[kRows][kPitch] = rows of `source`, zero beyond num_rows and num_cols. `vectorized` promises that rows are
// contiguous, aligned to 16 bytes, and num_cols a multiple of 16 bytes (forward.py: `is_vectorizable`).
// Finish with cp_async_wait_all() and a barrier.
template <int kRows, int kCols, int kPitch, int kThreads, class Element>
__device__ __forceinline__ void load_tile(Element* tile, const Element* source, int64_t row_stride,
                                          int64_t col_stride, int num_rows, int num_cols, bool vectorized) {
  if (vectorized) {
    constexpr int kVector = 16 / sizeof(Element), kVectors = kCols / kVector;
    if constexpr (kVectors <= kThreads) {
      // A thread keeps its column, so that the next address is one addition away.
      constexpr int kRowsAtOnce = kThreads / kVectors;
      constexpr bool kAllThreads = kRowsAtOnce * kVectors == kThreads;
      int row = threadIdx.x / kVectors, col = threadIdx.x % kVectors * kVector;
      const Element* from = source + row * row_stride + col;
      uint32_t to = shared_address(&tile[row * kPitch + col]);
      int rows_left = col < num_cols ? num_rows - row : 0;
      if (kAllThreads || row < kRowsAtOnce) {
#pragma unroll
        for (int first = 0; first < kRows; first += kRowsAtOnce) {
          if (kRows % kRowsAtOnce == 0 || first + row < kRows) {
            cp_async_16(to + first * kPitch * sizeof(Element), from, first < rows_left);
          }
          from += kRowsAtOnce * row_stride;
        }
      }
    } else {  // a row is longer than one go of all threads
      for (int idx = threadIdx.x; idx < kRows * kVectors; idx += kThreads) {
        int row = idx / kVectors, col = idx % kVectors * kVector;
        bool valid = row < num_rows && col < num_cols;
        cp_async_16(shared_address(&tile[row * kPitch + col]), source + row * row_stride + col, valid);
      }
    }
  } else {
    // Neighbouring threads read along whichever axis is closer together in memory.
    bool along_rows = llabs(row_stride) < llabs(col_stride);
#pragma unroll kAmpere && kCols <= 128 ? 2 : 1
    for (int idx = threadIdx.x; idx < kRows * kCols; idx += kThreads) {
      int row = along_rows ? idx % kRows : idx / kCols;
      int col = along_rows ? idx / kRows : idx % kCols;
      bool valid = row < num_rows && col < num_cols;
      tile[row * kPitch + col] = valid ? source[row * row_stride + col * col_stride] : Element(0);
    }
  }
}
