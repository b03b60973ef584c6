// Every CUDA launcher at small, ragged shapes, without torch: for compute-sanitizer, and for a first look at a new GPU.
//
//   nvcc -std=c++17 -arch=sm_90 -O3 -lineinfo tests/gpu/smoke.cu -o smoke            on a GPU
//   g++ -std=c++17 -O1 -x c++ -DSFM_SHIM -I tests/shim tests/gpu/smoke.cu -o smoke   its reference, on a CPU
//
// A line for each result: name, two numbers of the shape, error code, values that aren't finite, and of the rest the sum,
// the norm and a weighted sum. `benchmarks/gpu/smoke.py` compares two such texts. `--reversed` (CPU): threads and blocks in
// the other order. `--profile` (GPU): a call of each kernel at a size that fills a GPU, for a profiler.
#define SFM_CANVAS_BYTES 60000  // several blocks of small images

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "../../csrc/cuda/augment.cu"
#include "../../csrc/cuda/class_means.cu"
#include "../../csrc/cuda/flow_alignment.cu"
#include "../../csrc/cuda/pair_alignment.cu"
#include "../../csrc/cuda/render.cu"
#include "../../csrc/cuda/render_augment.cu"

namespace {

using namespace sfm;

#ifdef SFM_SHIM
void* device(size_t bytes) {
  const size_t whole = (bytes + 255) / 256 * 256;
  void* memory = std::aligned_alloc(256, whole > 0 ? whole : 256);
  return std::memset(memory, 0xff, bytes), memory;
}
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void clear(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }
int wait() {
  const int error = emu::status;
  emu::status = cudaSuccess;
  return error;
}
#else
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
void clear(void* memory, size_t bytes) { check(cudaMemset(memory, 0xff, bytes), "cudaMemset"); }
void* device(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes > 0 ? bytes : 1), "cudaMalloc");
  return clear(memory, bytes), memory;
}
void upload(void* to, const void* from, size_t n) { check(cudaMemcpy(to, from, n, cudaMemcpyHostToDevice), "upload"); }
void download(void* to, const void* from, size_t n) { check(cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost), "download"); }
int wait() { return int(cudaDeviceSynchronize()); }
#endif

uint32_t state = 1;
float draw() {  // uniform in -1 ... 1
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / 8388608.f - 1.f;
}
float* floats(size_t count, float scale = 1.f) {
  std::vector<float> values(count);
  for (float& value : values) value = scale * draw();
  void* memory = device(4 * count);
  return upload(memory, values.data(), 4 * count), static_cast<float*>(memory);
}
template <typename T>
T* placed(const std::vector<T>& values) {
  void* memory = device(sizeof(T) * values.size());
  return upload(memory, values.data(), sizeof(T) * values.size()), static_cast<T*>(memory);
}
float* empty(size_t count) { return static_cast<float*>(device(4 * count)); }  // NaN until written

int failures = 0;
void say(const char* name, int a, int b, cudaError_t error, const float* result, size_t count) {
  const int code = error != cudaSuccess ? int(error) : wait();
  std::vector<float> values(count);
  download(values.data(), result, 4 * count);
  double sum = 0, square = 0, weighted = 0;
  size_t bad = 0;
  for (size_t k = 0; k < count; ++k) {
    if (!std::isfinite(values[k])) {
      ++bad;
      continue;
    }
    sum += values[k], square += double(values[k]) * values[k], weighted += values[k] * std::cos(0.1 * double(k));
  }
  failures += code != 0 || bad != 0;
  std::printf("%-40s %5d %5d error %d bad %zu  %.7e %.7e %.7e\n", name, a, b, code, bad, sum, std::sqrt(square), weighted);
  std::fflush(stdout);
}

void losses() {
  const std::vector<std::pair<int, int>> shapes{{2, 1}, {13, 7}, {100, 64}, {257, 384}, {40, 1028}};
  for (const auto& [classes, dims] : shapes) {
    for (const bool labelled : {false, true}) {
      std::vector<int64_t> order, offsets{0};
      for (int c = 0; c < classes; ++c) offsets.push_back(offsets.back() + 1 + c % 4);
      const int64_t items = labelled ? offsets.back() : classes;
      for (int64_t k = 0; k < items; ++k) order.push_back(items - 1 - k);
      const Features features{floats(size_t(items) * dims), Dtype::float32, dims, labelled ? placed(order) : nullptr,
                              labelled ? placed(offsets) : nullptr};
      const size_t cells = size_t(classes) * dims, written = size_t(items) * dims;
      float *const centers = floats(cells), *const shift = floats(dims), *const point = floats(dims), *const one = floats(1);
      void* const work = device(flow_alignment_workspace_bytes(classes, dims));
      for (int kind = GLOBAL_COSINE; kind <= ANCHORED_COSINE; ++kind) {
        for (const bool fused : {true, false}) {
          const int64_t count = kind == CLASS_COSINE || kind == ANCHORED_COSINE ? classes : 1;
          const float* const anchor = kind == ANCHORED_COSINE ? point : nullptr;
          float *const loss = empty(1), *const rows = empty(2 * count), *const columns = empty(2 * dims);
          float* const gradient = empty(written);
          clear(work, flow_alignment_workspace_bytes(classes, dims));
          say(fused ? "flow_alignment fused" : "flow_alignment", classes, dims,
              flow_alignment(features, centers, shift, anchor, classes, dims, kind, 1e-8f, 0.3f, 0.1f, loss, rows, columns,
                             work, fused, nullptr),
              loss, 1);
          say("flow_alignment columns", classes, kind, cudaSuccess, columns, 2 * dims);
          say("flow_alignment_backward", classes, kind,
              flow_alignment_backward(one, features, centers, shift, rows, count, columns, classes, dims, gradient,
                                      nullptr),
              gradient, written);
        }
      }
      float *const means = empty(cells), *const gradient = empty(written);
      say("class_means", classes, dims, class_means(features, shift, classes, dims, means, nullptr), means, cells);
      say("class_means_backward", classes, dims,
          class_means_backward(means, features.order, features.offsets, classes, dims, Dtype::float32, gradient, nullptr),
          gradient, written);
    }
  }
}

void pairs() {
  const std::vector<std::pair<int, int>> shapes{{2, 3}, {65, 36}, {200, 131}};
  for (const auto& [classes, dims] : shapes) {
    float *const a = floats(size_t(classes) * dims), *const b = floats(size_t(classes) * dims);
    for (const bool gram : {true, false}) {
      for (const bool high : {false, true}) {
        for (const int tile : {1, 2}) {
          for (const bool part : {false, true}) {  // of the rows; all of them in blocks of 128
            PairProblem problem{a, b, nullptr, classes, dims, part ? classes / 3 : 0, classes, 1e-8f, true, high};
            problem.block_rows = part ? 0 : 128, problem.tile_size = tile, problem.gram = gram;
            const size_t written = size_t(problem.row_stop - problem.row_start) * dims;
            float* const gradient = empty(written);
            double* const total = static_cast<double*>(device(8));
            void* const work = device(pair_alignment_workspace_bytes(problem));
            const char* const name = gram ? (high ? "gram high" : "gram highest") : (high ? "pair high" : "pair highest");
            say(name, classes, dims * 10 + tile, pair_alignment(problem, total, gradient, work, nullptr), gradient, written);
            double value = 0;
            download(&value, total, 8);
            const float rounded = float(value);
            say(high ? "total high" : "total highest", classes, tile, cudaSuccess, placed<float>({rounded}), 1);
          }
        }
      }
    }
  }
}

void images() {
  const std::vector<std::pair<int, int>> shapes{{3, 32}, {1, 28}, {3, 131}, {3, 256}, {1, 600}};
  for (const auto& [channels, size] : shapes) {
    const int count = size <= 32 ? 9 : 2;
    Levels levels{};
    Sides sides{};
    size_t texels = 0;
    for (int side = 1; side <= size; side = side < size && 2 * side > size ? size : 2 * side) {
      const int k = sides.count++;
      const int64_t stride = int64_t(channels) * side * side;
      sides.side[k] = levels.side[k] = side, levels.stride[k] = stride, levels.data[k] = floats(count * stride, 0.4f);
      texels += stride;
    }
    levels.count = sides.count;
    const size_t pixels = size_t(count) * channels * size * size;
    float* const canvas = empty(pixels);
    for (const bool quads : {false, true}) {
      say(quads ? "render quads" : "render", channels, size,
          render(levels, nullptr, count, channels, size, Dtype::float32, canvas, quads, nullptr), canvas, pixels);
    }
    float *const upstream = floats(pixels), *const gradient = empty(count * texels);
    void* const work = device(render_backward_workspace_bytes(sides, count, channels, size));
    say("render_backward", channels, size,
        render_backward(upstream, canvas, Dtype::float32, sides, count, channels, size, gradient, work, nullptr), gradient,
        count * texels);

    const int view = size * 7 / 8 + 1;
    const ViewShape shape{2 * count, count, channels, 3, size, size, view};
    std::vector<float> corners;
    std::vector<int64_t> numbers;
    for (int v = 0; v < 2 * count; ++v) {
      const float step = v % 2 ? -0.6f : 0.7f;
      for (const float x : {v % 2 ? float(size) - 1 : 0.3f * v, step, 0.2f * size, 0.5f}) corners.push_back(x);
      numbers.push_back(v % 3 == 1 ? -1 : 5 + 1000003 * int64_t(v));
    }
    const float *const boxes = placed(corners), *const deviation = placed<float>({0.4f, 0.5f, 0.6f});
    const ViewNoise noise{placed(numbers), 0.f, 0.1f, 0x8000000000000005ull, 7, 2};
    const size_t shown = size_t(shape.views) * 3 * view * view;
    float *const views = empty(shown), *const back = empty(pixels), *const from = floats(shown);
    say("augment", channels, size,
        augment(canvas, Dtype::float32, shape, boxes, noise, deviation, deviation, Dtype::float32, views, nullptr), views,
        shown);
    say("augment_backward", channels, size,
        augment_backward(from, Dtype::float32, shape, boxes, deviation, Dtype::float32, back, nullptr), back, pixels);
    for (const bool blocks : {true, false}) {
      float *const together = empty(shown), *const level_gradient = empty(count * texels);
      void* const space = device(render_augment_workspace_bytes(count, channels, size, blocks));
      say(blocks ? "render_augment blocks" : "render_augment", channels, size,
          render_augment(levels, nullptr, size, shape, boxes, noise, deviation, deviation, Dtype::float32, together, space,
                         blocks, nullptr),
          together, shown);
      void* const backward_space = device(render_augment_backward_workspace_bytes(sides, count, channels, size, blocks));
      say(blocks ? "render_augment_backward blocks" : "render_augment_backward", channels, size,
          render_augment_backward(from, Dtype::float32, levels, nullptr, size, shape, boxes, deviation, level_gradient,
                                  backward_space, blocks, nullptr),
          level_gradient, count * texels);
    }
  }
}

// One call of each kernel worth a look at its counters, at sizes that fill a GPU.
void profile() {
  const int classes = 2048, dims = 1024;
  const size_t cells = size_t(classes) * dims;
  float *const a = floats(cells), *const b = floats(cells), *const gradient = empty(cells), *const shift = floats(dims);
  const Features features{b, Dtype::float32, dims, nullptr, nullptr};
  flow_alignment(features, a, shift, nullptr, classes, dims, GLOBAL_COSINE, 1e-8f, 1.f, 0.f, empty(1), empty(2), empty(2 * dims),
                 device(flow_alignment_workspace_bytes(classes, dims)), true, nullptr);
  const int images = 16, size = 256, view = 224;
  Levels levels{};
  Sides sides{};
  size_t texels = 0;
  for (int side = 1; side <= size; side *= 2) {
    const int k = sides.count++;
    sides.side[k] = levels.side[k] = side, levels.stride[k] = 3 * int64_t(side) * side;
    levels.data[k] = floats(images * levels.stride[k], 0.4f), texels += levels.stride[k];
  }
  levels.count = sides.count;
  const size_t pixels = size_t(images) * 3 * size * size;
  float *const canvas = empty(pixels), *const upstream = floats(pixels);
  render(levels, nullptr, images, 3, size, Dtype::float32, canvas, true, nullptr);
  render_backward(upstream, canvas, Dtype::float32, sides, images, 3, size, empty(images * texels),
                  device(render_backward_workspace_bytes(sides, images, 3, size)), nullptr);
  std::vector<float> corners;
  for (int v = 0; v < images; ++v) {
    for (const float x : {10.f + v, 0.7f, 20.f, 0.6f}) corners.push_back(x);
  }
  const ViewShape shape{images, images, 3, 3, size, size, view};
  float* const back = empty(pixels);
  augment_backward(floats(size_t(images) * 3 * view * view), Dtype::float32, shape, placed(corners),
                   placed<float>({0.4f, 0.5f, 0.6f}), Dtype::float32, back, nullptr);
  PairProblem problem{a, b, nullptr, classes, dims, 0, classes, 1e-8f, true, false};  // one block: two launches
  double* const total = static_cast<double*>(device(8));
  pair_alignment(problem, total, gradient, device(pair_alignment_workspace_bytes(problem)), nullptr);
  say("profile", classes, dims, cudaSuccess, back, pixels);
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && std::strcmp(words[1], "--profile") == 0) {
    profile();
    return failures != 0;
  }
  if (count > 1 && std::strcmp(words[1], "--reversed") == 0) {
#ifdef SFM_SHIM
    emu::set_reversed(true);
#endif
  }
  losses();
  pairs();
  images();
  std::printf("failures %d\n", failures);
  return failures != 0;
}
