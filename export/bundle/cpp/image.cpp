#include "image.h"

#include <algorithm>

namespace espalier {

Image upright(const PixelView& stored, int orientation) {
    const bool turned = orientation >= 5 && orientation <= 8;
    Image result;
    result.width = turned ? stored.height : stored.width;
    result.height = turned ? stored.width : stored.height;
    result.pixels.resize(static_cast<std::size_t>(result.width) * static_cast<std::size_t>(result.height) * 3);

    const int last_column = stored.width - 1;
    const int last_row = stored.height - 1;
    std::uint8_t* target = result.pixels.data();
    for (int y = 0; y < result.height; ++y) {
        for (int x = 0; x < result.width; ++x) {
            int column = turned ? y : x;
            int row = turned ? x : y;
            if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
                column = last_column - column;
            }
            if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
                row = last_row - row;
            }
            const std::uint8_t* source = stored.pixels + static_cast<std::size_t>(row) * stored.row_bytes +
                                         static_cast<std::size_t>(column) * static_cast<std::size_t>(stored.pixel_bytes);
            target = std::copy(source, source + 3, target);
        }
    }
    return result;
}

int orientation_of_rotation(int degrees) {
    switch (degrees) {
        case 90: return 6;
        case 180: return 3;
        case 270: return 8;
        default: return 1;
    }
}

}  // namespace espalier
