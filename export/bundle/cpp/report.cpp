#include "report.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>

namespace espalier {

namespace {

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
    char text[256];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

// The length of the UTF-8 sequence that starts at `i` (RFC 3629), or 0.
std::size_t utf8_length(const std::string& text, std::size_t i) {
    const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(at < text.size() ? text[at] : '\0'); };
    const unsigned char lead = byte(i);
    if (lead < 0x80) {
        return 1;
    }
    const std::size_t length = lead >= 0xF5 ? 0 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 0;
    for (std::size_t k = 1; k < length; ++k) {
        if ((byte(i + k) & 0xC0) != 0x80) {
            return 0;
        }
    }
    // Neither what a shorter sequence says too, nor surrogates, nor what lies above U+10FFFF.
    const unsigned char second = byte(i + 1);
    const bool wrong = (lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
                       (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F);
    return wrong ? 0 : length;
}

std::string statistics(const std::vector<Timing>& timings, double (*part)(const Timing&)) {
    std::vector<double> samples(timings.size());
    std::transform(timings.begin(), timings.end(), samples.begin(), part);
    const double sum = std::accumulate(samples.begin(), samples.end(), 0.0);
    return formatted("{\"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"mean\": %.4f}", percentile(samples, 0.5),
                     percentile(samples, 0.9), percentile(samples, 0.99),
                     samples.empty() ? 0.0 : sum / static_cast<double>(samples.size()));
}

std::string image_json(const ImageResult& result, const std::vector<std::string>& labels) {
    std::string json = "    {\"file\": " + quoted(result.file) +
                       formatted(", \"width\": %d, \"height\": %d, \"detections\": [", result.width, result.height);
    const char* separator = "\n";
    for (const Detection& box : result.detections) {
        json += separator;
        json += formatted("      {\"class\": %d, \"name\": ", box.label);
        json += quoted(labels[static_cast<std::size_t>(box.label)]);
        json += formatted(", \"score\": %.6f, \"box\": [%.4f, %.4f, %.4f, %.4f]}", static_cast<double>(box.score),
                          static_cast<double>(box.x1), static_cast<double>(box.y1), static_cast<double>(box.x2),
                          static_cast<double>(box.y2));
        separator = ",\n";
    }
    return json + (result.detections.empty() ? "]}" : "\n    ]}");
}

}  // namespace

std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (std::size_t i = 0; i < text.size();) {
        const std::size_t length = utf8_length(text, i);
        const auto byte = static_cast<unsigned char>(text[i]);
        if (length == 0) {
            result += "\\ufffd";
        } else if (byte == '"' || byte == '\\') {
            result += '\\';
            result += text[i];
        } else if (byte < 0x20) {
            result += formatted("\\u%04x", static_cast<unsigned>(byte));
        } else {
            result += text.substr(i, length);
        }
        i += std::max(length, std::size_t{1});
    }
    return result + "\"";
}

double percentile(std::vector<double> samples, double share) {
    if (samples.empty()) {
        return 0.0;
    }
    std::sort(samples.begin(), samples.end());
    const double position = share * static_cast<double>(samples.size() - 1);
    const auto below = static_cast<std::size_t>(position);
    const std::size_t above = std::min(below + 1, samples.size() - 1);
    return samples[below] + (position - static_cast<double>(below)) * (samples[above] - samples[below]);
}

std::string to_json(const Report& report) {
    std::string json = "{\n  \"runtime\": " + quoted(report.runtime) + ",\n  \"precision\": " +
                       quoted(report.precision) + ",\n  \"jpeg_reader\": " + quoted(report.jpeg_reader) +
                       formatted(",\n  \"threads\": %d,\n  \"images\": [", report.threads);
    const char* separator = "\n";
    for (const ImageResult& image : report.images) {
        json += separator + image_json(image, report.labels);
        separator = ",\n";
    }
    const std::vector<Timing>& all = report.timings;
    json += formatted("\n  ],\n  \"latency_ms\": {\n    \"samples\": %zu", all.size());
    json += ",\n    \"preprocess\": " + statistics(all, [](const Timing& part) { return part.preprocess_ms; });
    json += ",\n    \"inference\": " + statistics(all, [](const Timing& part) { return part.inference_ms; });
    json += ",\n    \"postprocess\": " + statistics(all, [](const Timing& part) { return part.postprocess_ms; });
    json += ",\n    \"total\": " + statistics(all, [](const Timing& part) {
        return part.preprocess_ms + part.inference_ms + part.postprocess_ms;
    });
    return json + "\n  }\n}\n";
}

}  // namespace espalier
