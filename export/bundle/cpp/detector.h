// The detector: pixels in, boxes in the pixels of the image out.
#pragma once

#include <string>
#include <vector>

#include "head.h"
#include "image.h"
#include "model_files.h"
#include "net.h"
#include "timing.h"

namespace espalier {

// One model on the CPU. Functions that can fail return what is wrong in one line, or nothing; none throws, because
// ncnn's Android libraries make their users compile without exceptions.
class Detector {
public:
    // Opens a model folder with so many threads; once, before anything else.
    std::string open(const std::string& folder, int threads);

    std::string detect(const PixelView& image, std::vector<Detection>& detections, Timing& timing) const;

    const std::vector<std::string>& labels() const { return files_.labels; }
    const std::string& precision() const { return files_.precision; }
    HeadSettings& settings() { return files_.head; }

private:
    ModelFiles files_;
    ncnn::Net net_;
};

}  // namespace espalier
