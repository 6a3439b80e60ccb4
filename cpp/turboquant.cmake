# The core's sources and flags, in one place. Including this file defines the OBJECT library turboquant_objects, which
# the Python module, the tests and llama.cpp's ggml-base link.
#
# One row per ISA: sources, the flags that only they get. Everything else is compiled for the baseline CPU, so that the
# choice at run time is safe.
set(TURBOQUANT_ROOT ${CMAKE_CURRENT_LIST_DIR})
set(_tq_src ${TURBOQUANT_ROOT}/src)

find_package(Threads REQUIRED)
add_library(turboquant_objects OBJECT
    ${_tq_src}/api.cpp ${_tq_src}/attention.cpp ${_tq_src}/dispatch.cpp ${_tq_src}/scalar.cpp)
target_include_directories(turboquant_objects PUBLIC $<BUILD_INTERFACE:${TURBOQUANT_ROOT}/include>)
target_compile_features(turboquant_objects PUBLIC cxx_std_17)
target_link_libraries(turboquant_objects PUBLIC Threads::Threads)
set_target_properties(turboquant_objects PROPERTIES
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)

function(_tq_isa define)
    cmake_parse_arguments(ARG "" "" "SOURCES;FLAGS" ${ARGN})
    target_compile_definitions(turboquant_objects PRIVATE ${define})
    foreach(source ${ARG_SOURCES})
        target_sources(turboquant_objects PRIVATE ${_tq_src}/${source})
        set_source_files_properties(${_tq_src}/${source} PROPERTIES COMPILE_OPTIONS "${ARG_FLAGS}")
    endforeach()
endfunction()

if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    message(STATUS "TurboQuant: scalar kernels only (the SIMD kernels need GCC or Clang)")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    set(_tq_avx2 -mavx2 -mfma -mf16c)
    set(_tq_avx512 ${_tq_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # its own intrinsics headers pass undefined registers (GCC bug 105593)
        list(APPEND _tq_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
    endif()
    _tq_isa(TURBOQUANT_X86 SOURCES avx2.cpp FLAGS ${_tq_avx2})
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag(-mavxvnni TURBOQUANT_HAS_AVXVNNI) # GCC 11, Clang 12
    if(TURBOQUANT_HAS_AVXVNNI)
        _tq_isa(TURBOQUANT_AVXVNNI SOURCES avxvnni.cpp FLAGS ${_tq_avx2} -mavxvnni -mgfni)
    endif()
    _tq_isa(TURBOQUANT_X86 SOURCES avx512.cpp FLAGS ${_tq_avx512})
    _tq_isa(TURBOQUANT_X86 SOURCES avx512vnni.cpp FLAGS ${_tq_avx512} -mavx512vnni)
    _tq_isa(TURBOQUANT_X86 SOURCES avx512vbmi.cpp FLAGS ${_tq_avx512} -mavx512vnni -mavx512vbmi -mgfni)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    _tq_isa(TURBOQUANT_ARM64 SOURCES neon.cpp FLAGS -march=armv8-a)
    _tq_isa(TURBOQUANT_ARM64 SOURCES neon_dotprod.cpp FLAGS -march=armv8.2-a+dotprod)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12 vectorises the encoder's choice between two centroids wrongly (turbo2, on x86-64 and on AArch64).
    set_source_files_properties(${_tq_src}/scalar.cpp PROPERTIES COMPILE_OPTIONS -fno-tree-vectorize)
endif()

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    # Identical results in every kernel: no fused multiply-adds that the source does not ask for, no fast math. -O3 even
    # in debug builds of the host: this is the inner loop of a token.
    target_compile_options(turboquant_objects PRIVATE
        -ffp-contract=off -fno-fast-math -fno-math-errno -Wall -Wextra $<$<NOT:$<BOOL:${TURBOQUANT_SANITIZE}>>:-O3>)
endif()
