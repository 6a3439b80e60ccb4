# Compares the output of a program with a file.
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE printed RESULT_VARIABLE status)
file(READ ${FILE} kept)
if(status OR NOT printed STREQUAL kept)
    message(FATAL_ERROR "${FILE} is not what ${PROGRAM} prints; this updates it: ${PROGRAM} > ${FILE}")
endif()
