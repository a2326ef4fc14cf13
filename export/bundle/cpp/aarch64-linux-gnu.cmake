# For CMAKE_TOOLCHAIN_FILE: from any Linux to 64-bit ARM Linux, such as Raspberry Pi OS (64-bit).
# AARCH64_ROOT in the environment may name a folder with libraries of the target, such as usr/lib/…/libjpeg.a.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
if(DEFINED ENV{AARCH64_ROOT})
    list(APPEND CMAKE_FIND_ROOT_PATH "$ENV{AARCH64_ROOT}")
    # Debian keeps headers that differ between architectures in a folder of each.
    set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES "$ENV{AARCH64_ROOT}/usr/include/aarch64-linux-gnu")
endif()
