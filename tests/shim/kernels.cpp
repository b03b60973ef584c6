// The CUDA sources compiled for the CPU emulator.
#ifndef SFM_SHIM
#define SFM_SHIM
#endif
#define SFM_CANVAS_BYTES 60000  // several blocks of small images

#include "../../csrc/cuda/augment.cu"
#include "../../csrc/cuda/class_means.cu"
#include "../../csrc/cuda/flow_alignment.cu"
#include "../../csrc/cuda/pair_alignment.cu"
#include "../../csrc/cuda/render.cu"
#include "../../csrc/cuda/render_augment.cu"
