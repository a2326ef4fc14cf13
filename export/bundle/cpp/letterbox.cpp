#include "letterbox.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace espalier {

namespace {

// Weights have 11 bits, as OpenCV's have.
constexpr float WEIGHT_ONE = 2048.0F;

// The two pixels of a line that one resized pixel is made of, and their weights.
struct Tap {
    int first;
    int second;
    int first_weight;
    int second_weight;
};

// Rounds halves to even, as Python and OpenCV do, as long as nobody changes the rounding mode.
int round_even(double value) {
    return static_cast<int>(std::nearbyint(value));
}

// OpenCV moves a tap that lies outside of the line horizontally, weights included, but vertically only its pixels. That
// makes no difference to exact numbers, and one of rounding to these.
std::vector<Tap> taps(int source, int target, bool move_weights) {
    const double scale = 1.0 / (static_cast<double>(target) / source);
    std::vector<Tap> result;
    result.reserve(static_cast<std::size_t>(target));
    for (int i = 0; i < target; ++i) {
        const float position = static_cast<float>((i + 0.5) * scale - 0.5);
        int first = static_cast<int>(std::floor(position));
        float share = position - static_cast<float>(first);
        if (move_weights && (first < 0 || first >= source - 1)) {
            first = std::clamp(first, 0, source - 1);
            share = 0.0F;
        }
        result.push_back({std::clamp(first, 0, source - 1), std::clamp(first + 1, 0, source - 1),
                          round_even((1.0F - share) * WEIGHT_ONE), round_even(share * WEIGHT_ONE)});
    }
    return result;
}

void resize_row(const PixelView& image, int row, const std::vector<Tap>& columns, std::vector<int>& result) {
    const std::uint8_t* pixels = image.pixels + static_cast<std::size_t>(row) * image.row_bytes;
    int* target = result.data();
    for (const Tap& tap : columns) {
        const std::uint8_t* first = pixels + static_cast<std::ptrdiff_t>(tap.first) * image.pixel_bytes;
        const std::uint8_t* second = pixels + static_cast<std::ptrdiff_t>(tap.second) * image.pixel_bytes;
        for (int channel = 0; channel < 3; ++channel) {
            *target++ = first[channel] * tap.first_weight + second[channel] * tap.second_weight;
        }
    }
}

}  // namespace

Placement place(int image_width, int image_height, int input_width, int input_height) {
    const double ratio =
        std::min(static_cast<double>(input_height) / image_height, static_cast<double>(input_width) / image_width);
    Placement result;
    result.width = std::max(round_even(image_width * ratio), 1);
    result.height = std::max(round_even(image_height * ratio), 1);
    result.left = round_even((input_width - result.width) / 2.0 - 0.1);
    result.top = round_even((input_height - result.height) / 2.0 - 0.1);
    result.gain_x = static_cast<double>(result.width) / image_width;
    result.gain_y = static_cast<double>(result.height) / image_height;
    return result;
}

void letterbox(const PixelView& image, const Placement& placement, int input_width, int input_height, int padding,
               float divisor, float* const planes[3]) {
    std::array<float, 256> values{};
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>(i) / divisor;
    }
    const std::size_t size = static_cast<std::size_t>(input_width) * static_cast<std::size_t>(input_height);
    for (int channel = 0; channel < 3; ++channel) {
        std::fill_n(planes[channel], size, values[static_cast<std::size_t>(padding)]);
    }

    const std::vector<Tap> columns = taps(image.width, placement.width, true);
    const std::vector<Tap> rows = taps(image.height, placement.height, false);
    const std::size_t row_size = columns.size() * 3;
    std::vector<int> upper(row_size);
    std::vector<int> lower(row_size);
    int upper_row = -1;
    int lower_row = -1;
    for (std::size_t y = 0; y < rows.size(); ++y) {
        const Tap& tap = rows[y];
        if (tap.first == lower_row) {
            std::swap(upper, lower);
            std::swap(upper_row, lower_row);
        }
        if (tap.first != upper_row) {
            resize_row(image, tap.first, columns, upper);
            upper_row = tap.first;
        }
        if (tap.second != lower_row) {
            resize_row(image, tap.second, columns, lower);
            lower_row = tap.second;
        }
        const std::size_t start = (static_cast<std::size_t>(placement.top) + y) * static_cast<std::size_t>(input_width) +
                                  static_cast<std::size_t>(placement.left);
        for (std::size_t i = 0; i < row_size; ++i) {
            // Both products lose 16 bits before they are added: so does OpenCV, for the sake of its vector units.
            const int sum = ((tap.first_weight * (upper[i] >> 4)) >> 16) + ((tap.second_weight * (lower[i] >> 4)) >> 16);
            planes[i % 3][start + i / 3] = values[static_cast<std::size_t>(std::clamp((sum + 2) >> 2, 0, 255))];
        }
    }
}

}  // namespace espalier
