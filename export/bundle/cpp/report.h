// The answer of the program: JSON (RFC 8259) with boxes and latency statistics.
#pragma once

#include <string>
#include <vector>

#include "head.h"
#include "timing.h"

namespace espalier {

struct ImageResult {
    std::string file;
    int width = 0;
    int height = 0;
    std::vector<Detection> detections;
};

struct Report {
    std::string runtime;
    std::string precision;
    std::string jpeg_reader;
    int threads = 1;
    std::vector<std::string> labels;  // by class
    std::vector<ImageResult> images;
    std::vector<Timing> timings;
};

// A JSON string with its quotes; bytes that are not UTF-8 become U+FFFD.
std::string quoted(const std::string& text);

// The value below which a share (0 to 1) of the samples lies, linear between two neighbours; 0 without samples.
double percentile(std::vector<double> samples, double share);

// The images and their boxes in px, and p50, p90, p99 and mean over all timings, in ms.
std::string to_json(const Report& report);

}  // namespace espalier
