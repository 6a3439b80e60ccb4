// The part of CUDA's runtime that the kernels' hosts and tests use. Device memory is memory of the host, and streams
// are ignored: every call is complete when it returns.
#ifndef TURBOQUANT_CUDA_EMULATOR_RUNTIME_API_H
#define TURBOQUANT_CUDA_EMULATOR_RUNTIME_API_H

#include <cstddef>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNotSupported = 801
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
    int ptxVersion;
};
using cudaStream_t = struct CUstream_st *;

const char * cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetDeviceCount(int * count);
cudaError_t cudaGetDevice(int * device);
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void ** data, size_t bytes);
cudaError_t cudaFree(void * data);
cudaError_t cudaMemset(void * data, int value, size_t bytes);
cudaError_t cudaMemcpy(void * to, const void * from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void * kernel);
cudaError_t cudaFuncSetAttribute(const void * kernel, cudaFuncAttribute attribute, int value);

#endif
