// The answer of the program: JSON (RFC 8259) with boxes and latency statistics.
#pragma once

#include <string>
#include <vector>

#include "detector.h"

namespace espalier {

struct ImageResult {
    std::string file;
    int width = 0;
    int height = 0;
    std::vector<Detection> detections;
};

// A JSON string with its quotes; bytes that are not UTF-8 become U+FFFD.
std::string quoted(const std::string& text);

// The value below which a share (0 to 1) of the samples lies, linear between two neighbours; 0 without samples.
double percentile(std::vector<double> samples, double share);

// The images and their boxes in px, best first, and over all timings p50, p90, p99 and mean in ms.
std::string to_json(const Detector& detector, int threads, const std::vector<ImageResult>& results,
                    const std::vector<Timing>& timings);

}  // namespace espalier
