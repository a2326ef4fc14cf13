// The head of the detector: from the maps of its last convolutions to the boxes that count.
#pragma once

#include <cstddef>
#include <vector>

#include "letterbox.h"

namespace espalier {

// One level of the head. A map is a sequence of planes of height × width floats, `step` floats apart: four sides of
// `reg_max` bins each for the boxes, one plane for each class for the scores, all of them logits.
struct Level {
    const float* boxes = nullptr;
    std::size_t box_step = 0;
    const float* scores = nullptr;
    std::size_t score_step = 0;
    int width = 0;
    int height = 0;
    int stride = 0;
};

struct Detection {
    float x1 = 0.0F;
    float y1 = 0.0F;
    float x2 = 0.0F;
    float y2 = 0.0F;
    float score = 0.0F;
    int label = 0;
};

struct HeadSettings {
    int classes = 0;
    int reg_max = 0;      // bins of the distribution over a distance; a single bin is the distance itself
    bool end2end = false; // one box for each object already: nothing is suppressed
    float confidence = 0.25F;
    float iou = 0.7F;
    int max_detections = 300;
};

// Tells whether a network's numbers held until here. Every plane is a sum over all channels before it, so the first one
// of each map shows what overflowed or was no number anywhere in them.
bool is_finite(const std::vector<Level>& levels);

// The detections of one image, best first, in px of the network's input. With one box for many anchors, each anchor
// stands for its best class, and of boxes of a class that overlap by more than `iou` the best remains.
std::vector<Detection> decode(const std::vector<Level>& levels, const HeadSettings& settings);

// Moves detections from the network's input to the image that was placed there, and cuts them at its borders.
void to_image(std::vector<Detection>& detections, const Placement& placement, int image_width, int image_height);

}  // namespace espalier
