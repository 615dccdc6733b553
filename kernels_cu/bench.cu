// What python -m lightning_cupy bench measures beside the ops: the floor that memory sets, and tools to time with.
// Constants come as -D from lightning_cupy/_bench_gpu.py.

// Of the vector of 16 bytes that a thread takes.
__device__ __forceinline__ long long vector_idx() {
  return static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x;
}

// o = q ^ k ^ v: the traffic of the forward, and no arithmetic. q and k have num_qk vectors, v and o have num_v.
// One vector a thread and no loop: on an H200 threads that loop, with more vectors under way each, are slower.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    stream(uint4* o, const uint4* q, const uint4* k, const uint4* v, long long num_qk, long long num_v) {
  long long idx = vector_idx();
  uint4 zero = {0, 0, 0, 0};
  uint4 from_q = idx < num_qk ? __ldcs(q + idx) : zero;
  uint4 from_k = idx < num_qk ? __ldcs(k + idx) : zero;
  uint4 from_v = idx < num_v ? __ldcs(v + idx) : zero;
  uint4 result = {from_q.x ^ from_k.x ^ from_v.x, from_q.y ^ from_k.y ^ from_v.y, from_q.z ^ from_k.z ^ from_v.z,
                  from_q.w ^ from_k.w ^ from_v.w};
  // NOTE: where q is wider than o, the second condition, hardly ever true, keeps its loads from being left out.
  if (idx < num_v || (result.x & result.y & result.z & result.w) == 0xfffffffe) {
    __stcs(o + (idx < num_v ? idx : 0), result);
  }
}

// dq = do ^ q, dk = do ^ k, dv = do ^ v, or so: the traffic of the backward, and no arithmetic. q, k, dq and dk have
// num_qk vectors, v, do and dv have num_v.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    stream_backward(uint4* dq, uint4* dk, uint4* dv, const uint4* dout, const uint4* q, const uint4* k, const uint4* v,
                    long long num_qk, long long num_v) {
  long long idx = vector_idx();
  uint4 zero = {0, 0, 0, 0};
  uint4 from_q = idx < num_qk ? __ldcs(q + idx) : zero;
  uint4 from_k = idx < num_qk ? __ldcs(k + idx) : zero;
  uint4 from_v = idx < num_v ? __ldcs(v + idx) : zero;
  uint4 from_do = idx < num_v ? __ldcs(dout + idx) : zero;
  auto mix = [](uint4 a, uint4 b) { return uint4{a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w}; };
  if (idx < num_qk) {
    __stcs(dq + idx, mix(from_q, from_do));
    __stcs(dk + idx, mix(from_k, from_do));
  }
  // NOTE: where v is narrower, all of it has gone into what is above; where it is wider, into this.
  if (idx < num_v) __stcs(dv + idx, mix(from_v, from_do));
}

// Fills L2 with lines of a buffer of zeros, larger than it. They are read, since lines that were written would have to
// go back to memory later, while a call is timed.
extern "C" __global__ void __launch_bounds__(NUM_THREADS) flush(uint4* zeros, long long num_vectors) {
  long long idx = vector_idx();
  if (idx >= num_vectors) return;
  uint4 x = zeros[idx];
  // NOTE: never true, but the compiler cannot know, and keeps the load.
  if ((x.x | x.y | x.z | x.w) != 0) zeros[idx] = uint4{0, 0, 0, 0};
}

// Keeps the stream busy for some cycles, while the host queues what is to be timed behind it.
extern "C" __global__ void wait(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

// What a launch alone costs the host.
extern "C" __global__ void nothing() {}
