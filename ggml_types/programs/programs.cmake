# This project's programs that use libllama. llama.cmake calls the function when the target llama exists.
function(turboquant_add_programs folder)
    foreach (program turboquant-capture turboquant-measure)
        add_executable(${program} "${folder}/${program}.cpp")
        target_compile_features(${program} PRIVATE cxx_std_17)
        target_link_libraries(${program} PRIVATE llama)
    endforeach()
endfunction()
