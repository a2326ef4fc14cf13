// The parts of the deploy bundle that need no ncnn, one by one: numbers in on stdin, numbers out on stdout.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "head.h"
#include "image.h"
#include "image_file.h"
#include "letterbox.h"
#include "model_files.h"
#include "report.h"

namespace {

using namespace espalier;

template <class T>
std::vector<T> read_all() {
    std::vector<T> values;
    for (T value; std::fread(&value, sizeof value, 1, stdin) == 1;) {
        values.push_back(value);
    }
    return values;
}

template <class T>
void write_all(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// letterbox WIDTH HEIGHT PIXEL_BYTES INPUT_WIDTH INPUT_HEIGHT: pixels to planes
void run_letterbox(char** words) {
    const int width = std::atoi(words[0]), height = std::atoi(words[1]), bytes = std::atoi(words[2]);
    const int input_width = std::atoi(words[3]), input_height = std::atoi(words[4]);
    const std::vector<std::uint8_t> pixels = read_all<std::uint8_t>();
    const std::size_t row_bytes = pixels.size() / static_cast<std::size_t>(height);
    const std::size_t plane = static_cast<std::size_t>(input_width * input_height);
    std::vector<float> output(3 * plane);
    float* const planes[3] = {output.data(), output.data() + plane, output.data() + 2 * plane};
    letterbox({pixels.data(), width, height, row_bytes, bytes}, place(width, height, input_width, input_height),
              input_width, input_height, 114, 255.0F, planes);
    write_all(output);
}

// decode CLASSES REG_MAX END2END CONFIDENCE IOU MOST IMAGE_WIDTH IMAGE_HEIGHT INPUT STRIDE…: maps to rows of 6
void run_decode(char** words, int count) {
    HeadSettings settings;
    settings.classes = std::atoi(words[0]);
    settings.reg_max = std::atoi(words[1]);
    settings.end2end = std::atoi(words[2]) != 0;
    settings.confidence = std::strtof(words[3], nullptr);
    settings.iou = std::strtof(words[4], nullptr);
    settings.max_detections = std::atoi(words[5]);
    const int image_width = std::atoi(words[6]), image_height = std::atoi(words[7]), input = std::atoi(words[8]);
    const std::vector<float> maps = read_all<float>();
    const float* next = maps.data();
    std::vector<Level> levels;
    for (int i = 9; i < count; ++i) {
        Level level;
        level.stride = std::atoi(words[i]);
        level.width = level.height = input / level.stride;
        level.box_step = level.score_step = static_cast<std::size_t>(level.width * level.height);
        level.boxes = next;
        level.scores = level.boxes + level.box_step * static_cast<std::size_t>(4 * settings.reg_max);
        next = level.scores + level.score_step * static_cast<std::size_t>(settings.classes);
        levels.push_back(level);
    }
    if (!is_finite(levels)) {
        std::fputs("not finite", stdout);
        return;
    }
    std::vector<Detection> found = decode(levels, settings);
    to_image(found, place(image_width, image_height, input, input), image_width, image_height);
    std::vector<float> rows;
    for (const Detection& box : found) {
        rows.insert(rows.end(), {box.x1, box.y1, box.x2, box.y2, box.score, static_cast<float>(box.label)});
    }
    write_all(rows);
}

// upright WIDTH HEIGHT ORIENTATION: RGB pixels to RGB pixels
void run_upright(char** words) {
    const int width = std::atoi(words[0]), height = std::atoi(words[1]);
    const std::vector<std::uint8_t> pixels = read_all<std::uint8_t>();
    write_all(upright({pixels.data(), width, height, static_cast<std::size_t>(width) * 3, 3}, std::atoi(words[2])).pixels);
}

// images PATH: what is wrong with it, or the name and the size of each image there, a line each
void run_images(const char* path) {
    std::vector<std::string> paths;
    std::string said = find_images(path, paths);
    for (const std::string& one : paths) {
        Image image;
        said += read_image(one, image);
        said += one + " " + std::to_string(image.width) + " " + std::to_string(image.height) + "\n";
    }
    std::fputs(said.c_str(), stdout);
}

// report WIDTH MS…: JSON of one image with the name on stdin, and of so many timings
void run_report(char** words, int count) {
    const std::vector<char> name = read_all<char>();
    Report report;
    report.runtime = "none";
    report.labels = {std::string(name.begin(), name.end())};
    report.images.push_back({report.labels[0], std::atoi(words[0]), 2, {{1, 2, 3, 4, 0.5, 0}}});
    for (int i = 1; i < count; ++i) {
        report.timings.push_back({std::strtod(words[i], nullptr), 1.0, 0.5});
    }
    std::fputs(to_json(report).c_str(), stdout);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = arguments[1];
    char** words = arguments + 2;
    if (what == "letterbox") {
        run_letterbox(words);
    } else if (what == "decode") {
        run_decode(words, count - 2);
    } else if (what == "upright") {
        run_upright(words);
    } else if (what == "images") {
        run_images(words[0]);
    } else if (what == "report") {
        run_report(words, count - 2);
    } else if (what == "model") {
        ModelFiles files;
        std::fputs(read_model_files(words[0], files).c_str(), stdout);
    }
    return 0;
}
