// What a model folder says about itself: detector.txt and labels.txt, written by `python -m export.ncnn --bundle`.
#pragma once

#include <string>
#include <vector>

#include "head.h"

namespace espalier {

struct ModelFiles {
    std::string param;  // paths
    std::string bin;
    std::string precision;
    std::vector<std::string> labels;  // by class
    int input_width = 0;
    int input_height = 0;
    int padding = 114;        // pixel value around the image
    float divisor = 255.0F;   // from pixel values to what the network takes
    std::vector<int> strides; // of the levels, px
    std::vector<std::string> outputs;  // two for each level: boxes, scores
    HeadSettings head;
};

// Reads and checks a model folder. Returns what is wrong in one line, or nothing.
std::string read_model_files(const std::string& folder, ModelFiles& files);

}  // namespace espalier
