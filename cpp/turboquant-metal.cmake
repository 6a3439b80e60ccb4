# The Metal kernels' host code, and their sources as one text, which the device's compiler gets at run time.
set(TURBOQUANT_METAL_FOLDER ${CMAKE_CURRENT_LIST_DIR}/metal)
# In an order in which each file follows those that it includes.
set(TURBOQUANT_METAL_SOURCES language.h arguments.h constants.h device.h levels.h trellis.h codec.metal load.h attention.metal)

# Writes the text as C++ to `file`. It is a row of strings, because compilers limit the length of one.
function(turboquant_write_metal_source file)
    set(text "#include \"turboquant_metal.h\"\n\nconst char * const turboquant::metal::library_source =\n")
    foreach(name ${TURBOQUANT_METAL_SOURCES})
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${TURBOQUANT_METAL_FOLDER}/${name})
        file(READ ${TURBOQUANT_METAL_FOLDER}/${name} source)
        string(REGEX REPLACE "#include \"[^\"]*\"\n" "" source "${source}")
        string(APPEND text "R\"metal(${source})metal\"\n")
    endforeach()
    string(APPEND text ";\n")
    set(before "")
    if(EXISTS ${file})
        file(READ ${file} before)
    endif()
    if(NOT before STREQUAL text)
        file(WRITE ${file} "${text}")
    endif()
endfunction()

# Adds the host code and the text to `target`.
function(turboquant_add_metal target)
    set(generated ${CMAKE_CURRENT_BINARY_DIR}/turboquant-metal-source.cpp)
    turboquant_write_metal_source(${generated})
    target_sources(${target} PRIVATE
        ${TURBOQUANT_METAL_FOLDER}/codec.cpp
        ${TURBOQUANT_METAL_FOLDER}/attention.cpp
        ${generated})
    target_include_directories(${target} PRIVATE ${TURBOQUANT_METAL_FOLDER} ${TURBOQUANT_METAL_FOLDER}/../include)
endfunction()
