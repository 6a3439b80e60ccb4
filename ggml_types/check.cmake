# Refuses a tree that is not patched, or that is patched with other hooks than those beside the glue.

file(STRINGS "${PROJECT_SOURCE_DIR}/include/ggml.h" TURBOQUANT_PATCHED REGEX "GGML_TYPE_TURBO4")
if (NOT TURBOQUANT_PATCHED)
    message(FATAL_ERROR "${PROJECT_SOURCE_DIR} is not patched: run `turboquant patch` on this llama.cpp tree first")
endif()

# The version is the hash of the hashes of all hooks.toml, sorted by name; `turboquant patch` computes it likewise.
file(GLOB TURBOQUANT_HOOKS "${CMAKE_CURRENT_LIST_DIR}/*/hooks.toml")
list(SORT TURBOQUANT_HOOKS)
set(TURBOQUANT_HASHES "")
foreach (file IN LISTS TURBOQUANT_HOOKS)
    file(SHA256 "${file}" hash)
    string(APPEND TURBOQUANT_HASHES "${hash}")
endforeach()
string(SHA256 TURBOQUANT_VERSION "${TURBOQUANT_HASHES}")
string(SUBSTRING "${TURBOQUANT_VERSION}" 0 16 TURBOQUANT_VERSION)

file(STRINGS "${PROJECT_SOURCE_DIR}/src/ggml.c" TURBOQUANT_PATCHED REGEX "TurboQuant's hooks, version ${TURBOQUANT_VERSION}")
if (NOT TURBOQUANT_PATCHED)
    message(FATAL_ERROR "${PROJECT_SOURCE_DIR} was patched with hooks of another version than those in "
        "${CMAKE_CURRENT_LIST_DIR}: run `turboquant unpatch` and `turboquant patch` of this version on the llama.cpp tree")
endif()

# CMake repeats the check when the hooks or ggml.c have changed.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${TURBOQUANT_HOOKS} "${PROJECT_SOURCE_DIR}/src/ggml.c")
