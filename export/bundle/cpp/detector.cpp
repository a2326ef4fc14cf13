#include "detector.h"

#include <chrono>

#include "letterbox.h"

namespace espalier {

namespace {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double, std::milli>(end - start).count();
}

bool has_shape(const ncnn::Mat& map, int planes, int height, int width) {
    return map.dims == 3 && map.c == planes && map.h == height && map.w == width && map.elemsize == sizeof(float);
}

}  // namespace

std::string Detector::open(const std::string& folder, int threads) {
    std::string error = read_model_files(folder, files_);
    if (!error.empty()) {
        return error;
    }
    const bool half = files_.precision == "fp16";
    net_.opt.num_threads = threads;
    net_.opt.use_vulkan_compute = false;
    net_.opt.use_bf16_storage = false;
    net_.opt.use_fp16_packed = half;
    net_.opt.use_fp16_storage = half;
    net_.opt.use_fp16_arithmetic = half;
    if (net_.load_param(files_.param.c_str()) != 0) {
        return files_.param + " cannot be opened by ncnn: copy the model folder again";
    }
    if (net_.load_model(files_.bin.c_str()) != 0) {
        return files_.bin + " cannot be opened by ncnn: copy the model folder again";
    }
    return "";
}

std::string Detector::detect(const PixelView& image, std::vector<Detection>& detections, Timing& timing) const {
    const Clock::time_point start = Clock::now();
    const Placement placement = place(image.width, image.height, files_.input_width, files_.input_height);
    ncnn::Mat input(files_.input_width, files_.input_height, 3);
    if (input.empty()) {
        return "out of memory";
    }
    float* const planes[3] = {input.channel(0), input.channel(1), input.channel(2)};
    letterbox(image, placement, files_.input_width, files_.input_height, files_.padding, files_.divisor, planes);

    const Clock::time_point prepared = Clock::now();
    ncnn::Extractor extractor = net_.create_extractor();
    extractor.input("in0", input);
    std::vector<ncnn::Mat> maps(files_.outputs.size());
    for (std::size_t i = 0; i < maps.size(); ++i) {
        if (extractor.extract(files_.outputs[i].c_str(), maps[i]) != 0) {
            return "ncnn cannot compute " + files_.outputs[i] + " of " + files_.param;
        }
    }

    const Clock::time_point inferred = Clock::now();
    std::vector<Level> levels;
    for (std::size_t i = 0; i < files_.strides.size(); ++i) {
        const int stride = files_.strides[i];
        const int width = files_.input_width / stride;
        const int height = files_.input_height / stride;
        const ncnn::Mat& boxes = maps[2 * i];
        const ncnn::Mat& scores = maps[2 * i + 1];
        if (!has_shape(boxes, 4 * files_.head.reg_max, height, width) ||
            !has_shape(scores, files_.head.classes, height, width)) {
            return files_.param + " does not compute what detector.txt says: write the bundle again";
        }
        levels.push_back({boxes, boxes.cstep, scores, scores.cstep, width, height, stride});
    }
    if (!is_finite(levels)) {
        return files_.param + " computes values that are not finite: " +
               (files_.precision == "fp16" ? "write the bundle without --half" : "check the weights");
    }
    detections = decode(levels, files_.head);
    to_image(detections, placement, image.width, image.height);
    timing = {ms_between(start, prepared), ms_between(prepared, inferred), ms_between(inferred, Clock::now())};
    return "";
}

}  // namespace espalier
