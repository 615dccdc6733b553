// What python -m lightning_cupy bench measures beside the ops: the floor that memory sets, and tools to time with.
// Constants come as -D from lightning_cupy/bench.py.

constexpr int kAhead = AHEAD;  // vectors that a thread has under way of each input: hides the latency of memory

// o = q ^ k ^ v by 16-byte vectors: the traffic of the forward, and no arithmetic. q and k have num_qk vectors, v and
// o have num_v. A block takes a tile of kAhead vectors a thread, then the one that lies a grid further.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    stream(uint4* o, const uint4* q, const uint4* k, const uint4* v, long long num_qk, long long num_v) {
  long long num_vectors = num_qk > num_v ? num_qk : num_v;
  long long tile = static_cast<long long>(kAhead) * NUM_THREADS;
  for (long long first = blockIdx.x * tile + threadIdx.x; first < num_vectors; first += gridDim.x * tile) {
    uint4 from_q[kAhead], from_k[kAhead], from_v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      long long idx = first + i * NUM_THREADS;
      from_q[i] = idx < num_qk ? __ldcs(q + idx) : uint4{0, 0, 0, 0};
      from_k[i] = idx < num_qk ? __ldcs(k + idx) : uint4{0, 0, 0, 0};
      from_v[i] = idx < num_v ? __ldcs(v + idx) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      long long idx = first + i * NUM_THREADS;
      uint4 result = {from_q[i].x ^ from_k[i].x ^ from_v[i].x, from_q[i].y ^ from_k[i].y ^ from_v[i].y,
                      from_q[i].z ^ from_k[i].z ^ from_v[i].z, from_q[i].w ^ from_k[i].w ^ from_v[i].w};
      // NOTE: where q is wider than o, the second condition, hardly ever true, keeps its loads from being left out.
      if (idx < num_v || (result.x & result.y & result.z & result.w) == 0xfffffffe) {
        __stcs(o + (idx < num_v ? idx : 0), result);
      }
    }
  }
}

// Keeps the stream busy for some cycles, while the host queues what is to be timed behind it.
extern "C" __global__ void wait(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

// What a launch alone costs the host.
extern "C" __global__ void nothing() {}
