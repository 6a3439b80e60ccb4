# The Metal kernels' host code and their sources as one text, which the device's compiler gets at run time.
set(TURBOQUANT_METAL_FOLDER ${CMAKE_CURRENT_LIST_DIR}/metal)
# In an order in which each file follows those that it includes.
set(TURBOQUANT_METAL_SOURCES language.h arguments.h constants.h device.h levels.h trellis.h codec.metal load.h attention.metal)

# Writes the text as C++ to `file`. It is a row of strings, because compilers limit the length of one.
function(turboquant_write_metal_source file)
    set(text "")
    foreach(name ${TURBOQUANT_METAL_SOURCES})
        file(READ ${TURBOQUANT_METAL_FOLDER}/${name} source)
        string(REGEX REPLACE "#include \"[^\"]*\"\n" "" source "${source}")
        string(APPEND text "R\"metal(${source})metal\"\n")
    endforeach()
    set(text "#include \"turboquant_metal.h\"\n\nconst char * const turboquant::metal::library_source =\n${text};\n")
    file(GENERATE OUTPUT ${file} CONTENT "${text}")
endfunction()

# Adds the host code and the text to `target`.
function(turboquant_add_metal target)
    set(generated ${CMAKE_CURRENT_BINARY_DIR}/turboquant-metal-source.cpp)
    if(NOT TARGET turboquant_metal_source)
        turboquant_write_metal_source(${generated})
        add_custom_target(turboquant_metal_source)
    endif()
    target_sources(${target} PRIVATE
        ${TURBOQUANT_METAL_FOLDER}/codec.cpp
        ${TURBOQUANT_METAL_FOLDER}/attention.cpp
        ${generated})
    target_include_directories(${target} PRIVATE ${TURBOQUANT_METAL_FOLDER} ${TURBOQUANT_METAL_FOLDER}/../include)
endfunction()
