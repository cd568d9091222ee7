# Another platform from this one. Zig's Clang has the headers and libraries of all of them (pip install ziglang).
#
#   NBHD_TARGET    such as x86_64-windows-gnu, aarch64-macos.11.0, aarch64-linux-gnu.2.28
#   NBHD_PYTHON    the Python that has ziglang
#
# Programs for Windows run under Wine (the Debian package wine64).
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES NBHD_TARGET NBHD_PYTHON)
if(NOT NBHD_TARGET MATCHES "^([a-z0-9_]+)-([a-z]+)")
  message(FATAL_ERROR "NBHD_TARGET must be a target of Zig's, such as aarch64-macos.11.0, got '${NBHD_TARGET}'.")
endif()
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(system ${CMAKE_MATCH_2})
if(system STREQUAL "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  set(CMAKE_SYSTEM_PROCESSOR arm64)
  set(CMAKE_OSX_DEPLOYMENT_TARGET "") # the target says it, and where the headers are
  set(CMAKE_OSX_SYSROOT "")
  set(CMAKE_INSTALL_NAME_TOOL true) # there is nothing to rename
elseif(system STREQUAL "windows")
  set(CMAKE_SYSTEM_NAME Windows)
  find_program(WINE NAMES wine64 wine HINTS /usr/lib/wine)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${WINE})
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_CXX_COMPILER ${NBHD_PYTHON} -m ziglang c++ -target ${NBHD_TARGET})
