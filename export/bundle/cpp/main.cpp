// detect: images in, JSON of boxes and latency statistics out. A mistake of the user is one line and exit code 2.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "detector.h"
#include "image_file.h"
#include "report.h"

namespace {

const char* const USAGE =
    "usage: detect [--model DIR] [--threads N] [--confidence X] [--iou X] [--warmup N] [--repeat N] IMAGE_OR_FOLDER...\n"
    "\n"
    "  --model DIR      folder with detector.txt (default: model)\n"
    "  --threads N      threads of ncnn (default: one for each core)\n"
    "  --confidence X   lowest score of a box, 0 to 1 (default: what detector.txt says)\n"
    "  --iou X          boxes of a class that overlap by more are one object, 0 to 1 (default: likewise)\n"
    "  --warmup N       detections before the first that counts (default: 1)\n"
    "  --repeat N       times that each image is detected, for the latency statistics (default: 1)\n";

struct Options {
    std::string model = "model";
    int threads = 0;
    int warmup = 1;
    int repeat = 1;
    double confidence = -1.0;
    double iou = -1.0;
    std::vector<std::string> inputs;
};

int fail(const std::string& message) {
    std::fprintf(stderr, "error: %s\n", message.c_str());
    return 2;
}

[[noreturn]] void out_of_memory() {
    std::_Exit(fail("out of memory: give fewer or smaller images"));
}

bool to_number(const char* text, double low, double high, double& value) {
    char* end = nullptr;
    value = std::strtod(text, &end);
    return end != text && *end == '\0' && value >= low && value <= high;
}

bool to_count(const char* text, int low, int high, int& value) {
    double number = 0.0;
    if (!to_number(text, low, high, number) || number != static_cast<double>(static_cast<int>(number))) {
        return false;
    }
    value = static_cast<int>(number);
    return true;
}

std::string parse(int count, char** arguments, Options& options) {
    for (int i = 1; i < count; ++i) {
        const std::string name = arguments[i];
        if (name.rfind("--", 0) != 0) {
            options.inputs.push_back(name);
            continue;
        }
        if (i + 1 == count) {
            return name + " needs a value: see --help";
        }
        const char* value = arguments[++i];
        bool fits = true;
        if (name == "--model") {
            options.model = value;
        } else if (name == "--threads") {
            fits = to_count(value, 1, 1024, options.threads);
        } else if (name == "--warmup") {
            fits = to_count(value, 0, 1000000, options.warmup);
        } else if (name == "--repeat") {
            fits = to_count(value, 1, 1000000, options.repeat);
        } else if (name == "--confidence") {
            fits = to_number(value, 0.0, 0.999999, options.confidence);
        } else if (name == "--iou") {
            fits = to_number(value, 0.0, 1.0, options.iou);
        } else {
            return "there is no option " + name + ": see --help";
        }
        if (!fits) {
            return name + " cannot be " + value + ": see --help";
        }
    }
    return options.inputs.empty() ? "give an image or a folder of images: see --help" : "";
}

// Detects on every image; returns what is wrong, or nothing.
std::string run(const espalier::Detector& detector, const Options& options, const std::vector<std::string>& paths,
                espalier::Report& report) {
    int warmup = options.warmup;
    for (const std::string& path : paths) {
        espalier::Image image;
        std::string error = espalier::read_image(path, image);
        if (!error.empty()) {
            return error;
        }
        espalier::ImageResult result{path, image.width, image.height, {}};
        for (int i = -warmup; i < options.repeat; ++i) {
            espalier::Timing timing;
            error = detector.detect(image.view(), result.detections, timing);
            if (!error.empty()) {
                return error;
            }
            if (i >= 0) {
                report.timings.push_back(timing);
            }
        }
        warmup = 0;
        report.images.push_back(std::move(result));
    }
    return "";
}

// By itself glibc gives large blocks back to the system as soon as they are free, and every inference pays for the page
// faults of getting them again: a quarter of the latency of a small network.
void keep_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
}

}  // namespace

int main(int count, char** arguments) {
    keep_memory();
    // Not an exception: ncnn may have been built so that its users have none.
    std::set_new_handler(out_of_memory);
    for (int i = 1; i < count; ++i) {
        if (std::strcmp(arguments[i], "--help") == 0) {
            std::fputs(USAGE, stdout);
            return 0;
        }
    }
    Options options;
    std::string error = parse(count, arguments, options);
    std::vector<std::string> paths;
    for (std::size_t i = 0; error.empty() && i < options.inputs.size(); ++i) {
        error = espalier::find_images(options.inputs[i], paths);
    }
    if (!error.empty()) {
        return fail(error);
    }

    if (options.threads == 0) {
        options.threads = static_cast<int>(std::thread::hardware_concurrency());
        options.threads = options.threads > 0 ? options.threads : 1;
    }
    espalier::Detector detector;
    error = detector.open(options.model, options.threads);
    if (!error.empty()) {
        return fail(error);
    }
    if (options.confidence >= 0.0) {
        detector.settings().confidence = static_cast<float>(options.confidence);
    }
    if (options.iou >= 0.0) {
        detector.settings().iou = static_cast<float>(options.iou);
    }

    espalier::Report report;
    report.runtime = "ncnn " NCNN_VERSION_STRING;
    report.precision = detector.precision();
    report.jpeg_reader = espalier::jpeg_reader();
    report.threads = options.threads;
    report.labels = detector.labels();
    error = run(detector, options, paths, report);
    if (!error.empty()) {
        return fail(error);
    }
    if (std::fputs(espalier::to_json(report).c_str(), stdout) < 0 || std::fflush(stdout) != 0) {
        return fail("the output cannot be written: free some space");
    }
    return 0;
}
