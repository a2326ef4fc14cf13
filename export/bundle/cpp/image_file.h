// Image files: JPEG, PNG and BMP.
#pragma once

#include <string>
#include <vector>

#include "image.h"

namespace espalier {

// Reads an image upright, as its EXIF orientation says; of 16 bits the upper 8. Returns what is wrong, or nothing.
std::string read_image(const std::string& path, Image& image);

// What reads JPEG files: libjpeg, whose pixels are OpenCV's, or stb_image, whose pixels differ a little.
const char* jpeg_reader();

// The path itself, or the images in a folder of that name, sorted. Returns what is wrong, or nothing.
std::string find_images(const std::string& path, std::vector<std::string>& images);

}  // namespace espalier
