#include "image_file.h"

#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include "simpleocv.h"

#if !NCNN_SIMPLEOCV
#error "this ncnn cannot read images: build it with -DNCNN_SIMPLEOCV=ON"
#endif

#ifdef ESPALIER_LIBJPEG
#include <jpeglib.h>
#endif

namespace espalier {

namespace {

using Bytes = std::vector<unsigned char>;

Bytes read_file(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
}

// Numbers of a TIFF header, of either byte order, that never read past its end.
class Tiff {
public:
    Tiff(const unsigned char* bytes, std::size_t size) : bytes_(bytes), size_(size) {
        little_ = size >= 2 && bytes[0] == 'I';
    }

    unsigned number(std::size_t offset, std::size_t length) const {
        unsigned value = 0;
        for (std::size_t i = 0; i < length && offset < size_ && length <= size_ - offset; ++i) {
            value = value << 8 | bytes_[offset + (little_ ? length - 1 - i : i)];
        }
        return value;
    }

private:
    const unsigned char* bytes_;
    std::size_t size_;
    bool little_ = false;
};

int orientation_of_tiff(const Tiff& tiff) {
    constexpr unsigned ORIENTATION = 0x0112;
    const std::size_t directory = tiff.number(4, 4);
    const unsigned entries = tiff.number(directory, 2);
    for (unsigned i = 0; i < entries; ++i) {
        const std::size_t entry = directory + 2 + std::size_t{12} * i;
        if (tiff.number(entry, 2) == ORIENTATION) {
            return static_cast<int>(tiff.number(entry + 8, 2));
        }
    }
    return 1;
}

// The orientation in the EXIF segment of a JPEG file; 1 where there is none (Exif 2.32, 4.5.4 and 4.6.2).
int jpeg_orientation(const Bytes& file) {
    std::size_t i = 2;
    while (i + 10 <= file.size() && file[i] == 0xFF) {
        if (file[i + 1] == 0xFF) {  // any marker may be preceded by such bytes
            ++i;
            continue;
        }
        const std::size_t length = std::size_t{file[i + 2]} << 8 | file[i + 3];
        const bool is_exif = file[i + 1] == 0xE1 && std::memcmp(&file[i + 4], "Exif\0", 6) == 0;
        if (is_exif && length >= 8 && i + 2 + length <= file.size()) {
            return orientation_of_tiff(Tiff(file.data() + i + 10, length - 8));
        }
        if (length < 2 || file[i + 1] == 0xDA) {
            break;
        }
        i += 2 + length;
    }
    return 1;
}

bool is_jpeg(const Bytes& file) {
    return file.size() > 3 && file[0] == 0xFF && file[1] == 0xD8 && file[2] == 0xFF;
}

// The orientation in the eXIf chunk of a PNG file, which OpenCV obeys too; 1 where there is none (PNG 3, 11.3.4.5).
int png_orientation(const Bytes& file) {
    for (std::size_t i = 8; i + 12 <= file.size();) {  // length, type, content, checksum
        const std::size_t length = std::size_t{file[i]} << 24 | std::size_t{file[i + 1]} << 16 |
                                   std::size_t{file[i + 2]} << 8 | file[i + 3];
        if (length > file.size() - i - 12) {
            break;
        }
        if (std::memcmp(&file[i + 4], "eXIf", 4) == 0) {
            return orientation_of_tiff(Tiff(file.data() + i + 8, length));
        }
        i += 12 + length;
    }
    return 1;
}

bool is_png(const Bytes& file) {
    return file.size() > 8 && std::memcmp(file.data(), "\x89PNG\r\n\x1a\n", 8) == 0;
}

#ifdef ESPALIER_LIBJPEG
// libjpeg calls `error_exit`, which must not return to it.
struct JpegError {
    jpeg_error_mgr manager;
    std::jmp_buf back;
};

[[noreturn]] void leave(j_common_ptr info) {
    std::longjmp(reinterpret_cast<JpegError*>(info->err)->back, 1);
}

void say_nothing(j_common_ptr) {}

// Decodes with libjpeg, whose pixels are those of OpenCV. False: let the other reader try.
bool read_jpeg(const Bytes& file, Image& image) {
    jpeg_decompress_struct info{};
    JpegError error{};
    info.err = jpeg_std_error(&error.manager);
    error.manager.error_exit = leave;
    error.manager.output_message = say_nothing;
    // Nothing with a destructor is made between here and the end: longjmp would pass it by.
    if (setjmp(error.back) != 0) {
        jpeg_destroy_decompress(&info);
        return false;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, file.data(), static_cast<unsigned long>(file.size()));
    jpeg_read_header(&info, TRUE);
    if (info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK) {
        jpeg_destroy_decompress(&info);
        return false;
    }
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    image.width = static_cast<int>(info.output_width);
    image.height = static_cast<int>(info.output_height);
    const std::size_t row_bytes = std::size_t{info.output_width} * 3;
    image.pixels.resize(row_bytes * info.output_height);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = image.pixels.data() + row_bytes * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    return true;
}
#endif

bool read_any(const std::string& path, Image& image) {
    const cv::Mat bgr = cv::imread(path, cv::IMREAD_COLOR);
    if (bgr.empty()) {
        return false;
    }
    image.width = bgr.cols;
    image.height = bgr.rows;
    image.pixels.assign(bgr.data, bgr.data + std::size_t{3} * static_cast<std::size_t>(bgr.cols) *
                                                 static_cast<std::size_t>(bgr.rows));
    for (std::size_t i = 0; i < image.pixels.size(); i += 3) {
        std::swap(image.pixels[i], image.pixels[i + 2]);
    }
    return true;
}

bool has_image_ending(const std::filesystem::path& path) {
    std::string ending = path.extension().string();
    std::transform(ending.begin(), ending.end(), ending.begin(),
                   [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
    return ending == ".jpg" || ending == ".jpeg" || ending == ".png" || ending == ".bmp";
}

}  // namespace

std::string read_image(const std::string& path, Image& image) {
    const Bytes file = read_file(path);
    bool done = false;
#ifdef ESPALIER_LIBJPEG
    done = is_jpeg(file) && read_jpeg(file, image);
#endif
    if (!done && !read_any(path, image)) {
        return path + " cannot be read as an image: remove or replace it";
    }
    const int orientation = is_jpeg(file) ? jpeg_orientation(file) : is_png(file) ? png_orientation(file) : 1;
    if (orientation > 1 && orientation <= 8) {
        image = upright(image.view(), orientation);
    }
    return "";
}

const char* jpeg_reader() {
#ifdef ESPALIER_LIBJPEG
    return "libjpeg";
#else
    return "stb_image";
#endif
}

std::string find_images(const std::string& path, std::vector<std::string>& images) {
    std::error_code error;
    if (!std::filesystem::exists(path, error)) {
        return path + " does not exist: check the path";
    }
    if (!std::filesystem::is_directory(path, error)) {
        images.push_back(path);
        return "";
    }
    const std::size_t before = images.size();
    std::filesystem::directory_iterator entries(path, error);
    for (; !error && entries != std::filesystem::directory_iterator(); entries.increment(error)) {
        if (has_image_ending(entries->path()) && entries->is_regular_file(error)) {
            images.push_back(entries->path().string());
        }
    }
    if (error) {
        return path + " cannot be listed: " + error.message();
    }
    if (images.size() == before) {
        return path + " has no images (.jpg, .jpeg, .png, .bmp)";
    }
    std::sort(images.begin() + static_cast<std::ptrdiff_t>(before), images.end());
    return "";
}

}  // namespace espalier
