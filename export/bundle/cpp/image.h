// Pixels in memory: what a file, a camera or a bitmap gives, and the upright copy of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace espalier {

// Pixels that somebody else owns, row by row from the top, each starting with red, green, blue.
struct PixelView {
    const std::uint8_t* pixels = nullptr;
    int width = 0;
    int height = 0;
    std::size_t row_bytes = 0;
    int pixel_bytes = 3;  // 3: RGB, 4: RGBA
};

// An RGB image of its own, without gaps between rows.
struct Image {
    int width = 0;
    int height = 0;
    std::vector<std::uint8_t> pixels;

    PixelView view() const { return {pixels.data(), width, height, static_cast<std::size_t>(width) * 3, 3}; }
};

// The upright RGB copy of what was stored with an EXIF orientation, 1 to 8; of any other number, the copy as it is.
Image upright(const PixelView& stored, int orientation);

// The EXIF orientation of a frame that must be turned clockwise by 0, 90, 180 or 270 degrees to stand upright.
int orientation_of_rotation(int degrees);

}  // namespace espalier
