#include "model_files.h"

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

namespace espalier {

namespace {

using Words = std::vector<std::string>;
using Entries = std::map<std::string, Words>;

const char* const FORMAT = "1";
constexpr int MAX_SIDE = 16384;
constexpr int MAX_CLASSES = 100000;

Words split(const std::string& line) {
    std::istringstream stream(line);
    Words words;
    for (std::string word; stream >> word;) {
        words.push_back(word);
    }
    return words;
}

Entries read_entries(std::istream& stream) {
    Entries entries;
    for (std::string line; std::getline(stream, line);) {
        Words words = split(line);
        if (words.empty() || words.front().front() == '#') {
            continue;
        }
        const std::string key = words.front();
        words.erase(words.begin());
        entries[key] = std::move(words);
    }
    return entries;
}

bool to_number(const std::string& word, double& value) {
    char* end = nullptr;
    value = std::strtod(word.c_str(), &end);
    return !word.empty() && *end == '\0';
}

bool to_number(const std::string& word, long long& value) {
    char* end = nullptr;
    errno = 0;
    value = std::strtoll(word.c_str(), &end, 10);
    return !word.empty() && *end == '\0' && errno == 0;
}

// Takes values out of detector.txt and remembers the first that is missing or out of range.
class Reader {
public:
    Reader(const Entries& entries, std::string file) : entries_(entries), file_(std::move(file)) {}

    std::string error() const { return error_; }

    const Words& words(const std::string& key, std::size_t count) {
        static const Words none;
        const auto found = entries_.find(key);
        if (found == entries_.end() || found->second.empty() || (count != 0 && found->second.size() != count)) {
            refuse(key);
            return none;
        }
        return found->second;
    }

    std::string word(const std::string& key) {
        const Words& found = words(key, 1);
        return found.empty() ? std::string() : found.front();
    }

    int integer(const std::string& key, int low, int high) {
        long long value = 0;
        if (!to_number(word(key), value) || value < low || value > high) {
            refuse(key);
            return low;
        }
        return static_cast<int>(value);
    }

    float real(const std::string& key, double low, double high) {
        double value = 0.0;
        if (!to_number(word(key), value) || !(value >= low && value <= high)) {
            refuse(key);
            return static_cast<float>(low);
        }
        return static_cast<float>(value);
    }

    void refuse(const std::string& key) {
        if (error_.empty()) {
            error_ = file_ + " has no usable \"" + key + "\": write the bundle again";
        }
    }

private:
    const Entries& entries_;
    std::string file_;
    std::string error_;
};

std::string check_size(const std::string& path, const std::string& expected) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    if (!stream) {
        return path + " is missing: copy the model folder again";
    }
    const std::string found = std::to_string(static_cast<long long>(stream.tellg()));
    if (found != expected) {
        return path + " has " + found + " bytes, it was written with " + expected + ": copy the model folder again";
    }
    return "";
}

std::string read_labels(const std::string& path, int classes, std::vector<std::string>& labels) {
    std::ifstream stream(path);
    if (!stream) {
        return path + " is missing: copy the model folder again";
    }
    labels.clear();
    for (std::string line; std::getline(stream, line);) {
        labels.push_back(line);
    }
    if (labels.size() != static_cast<std::size_t>(classes)) {
        return path + " has " + std::to_string(labels.size()) + " names for " + std::to_string(classes) +
               " classes: copy the model folder again";
    }
    return "";
}

}  // namespace

std::string read_model_files(const std::string& folder, ModelFiles& files) {
    const std::string path = folder + "/detector.txt";
    std::ifstream stream(path);
    if (!stream) {
        return folder + " is not a model folder: it has no detector.txt";
    }
    const Entries entries = read_entries(stream);
    Reader reader(entries, path);
    const std::string format = reader.word("format");
    if (reader.error().empty() && format != FORMAT) {
        return path + " has format " + format + ", this program reads " + FORMAT + ": build the program of this bundle";
    }

    const Words& param = reader.words("param", 2);
    const Words& bin = reader.words("bin", 2);
    files.precision = reader.word("precision");
    files.input_width = reader.integer("input_width", 1, MAX_SIDE);
    files.input_height = reader.integer("input_height", 1, MAX_SIDE);
    files.padding = reader.integer("padding", 0, 255);
    files.divisor = reader.real("divisor", 1.0, 255.0);
    files.outputs = reader.words("outputs", 0);
    files.head.classes = reader.integer("classes", 1, MAX_CLASSES);
    files.head.reg_max = reader.integer("reg_max", 1, 256);
    files.head.end2end = reader.integer("end2end", 0, 1) == 1;
    files.head.confidence = reader.real("confidence", 0.0, 0.999999);
    files.head.iou = reader.real("iou", 0.0, 1.0);
    files.head.max_detections = reader.integer("max_detections", 1, INT_MAX);
    files.strides.clear();
    for (const std::string& word : reader.words("strides", 0)) {
        long long stride = 0;
        if (!to_number(word, stride) || stride < 1 || stride > files.input_width || files.input_width % stride != 0 ||
            files.input_height % stride != 0) {
            reader.refuse("strides");
            break;
        }
        files.strides.push_back(static_cast<int>(stride));
    }
    if (files.outputs.size() != 2 * files.strides.size()) {
        reader.refuse("outputs");
    }
    if (files.precision != "fp32" && files.precision != "fp16" && files.precision != "int8") {
        reader.refuse("precision");
    }
    if (!reader.error().empty()) {
        return reader.error();
    }

    files.param = folder + "/" + param[0];
    files.bin = folder + "/" + bin[0];
    std::string error = check_size(files.param, param[1]);
    if (error.empty()) {
        error = check_size(files.bin, bin[1]);
    }
    return error.empty() ? read_labels(folder + "/labels.txt", files.head.classes, files.labels) : error;
}

}  // namespace espalier
