# ggml-cpu: the glue. Every variant of the CPU backend uses this list.
list(APPEND GGML_CPU_SOURCES "${TURBOQUANT_GLUE_DIR}/cpu/turbo-cpu.cpp")
