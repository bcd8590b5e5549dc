// What can be asked of the object without a GPU.

// The targets that the kernels were compiled for, as VQKERNELS_CUDA_ARCHS names them.
extern "C" __attribute__((visibility("default"))) const char* vqkernels_cuda_targets() {
  return VQKERNELS_CUDA_TARGETS;
}
