// What the three parts of one detection took.
#pragma once

namespace espalier {

struct Timing {
    double preprocess_ms = 0.0;
    double inference_ms = 0.0;
    double postprocess_ms = 0.0;
};

}  // namespace espalier
