// The input of the network: the image at its own aspect ratio, centred on grey, as Ultralytics' LetterBox makes it.
#pragma once

#include "image.h"

namespace espalier {

// Where an image lies inside the input of the network, px, and how many input pixels one of its pixels became.
struct Placement {
    int left = 0;
    int top = 0;
    int width = 0;
    int height = 0;
    double gain_x = 1.0;
    double gain_y = 1.0;
};

// Where an image of a size lies inside an input of a size; every side is at least 1.
Placement place(int image_width, int image_height, int input_width, int input_height);

// Fills three planes (red, green, blue) of input_height × input_width floats with pixel values divided by `divisor`.
// The resized pixels are those of OpenCV's 8-bit INTER_LINEAR, because the smallest difference moves scores.
void letterbox(const PixelView& image, const Placement& placement, int input_width, int input_height, int padding,
               float divisor, float* const planes[3]);

}  // namespace espalier
