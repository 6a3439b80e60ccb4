# ggml-cpu. Every variant of the CPU backend starts from this list.
list(APPEND GGML_CPU_SOURCES "${TURBOQUANT_GLUE_DIR}/cpu/turbo-cpu.cpp")
