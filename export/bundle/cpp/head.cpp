#include "head.h"

#include <algorithm>
#include <cmath>

namespace espalier {

namespace {

// Suppression looks at no more boxes than that, as Ultralytics' does not.
constexpr std::size_t MAX_CANDIDATES = 30000;

float sigmoid(float logit) {
    return 1.0F / (1.0F + std::exp(-logit));
}

// A logit below which no score is above the confidence; a little lower, so that the score itself decides.
float lowest_logit(float confidence) {
    return confidence <= 0.0F ? -INFINITY : std::log(confidence / (1.0F - confidence)) - 1e-3F;
}

float distance(const float* bins, std::size_t step, int reg_max) {
    if (reg_max == 1) {
        return *bins;
    }
    float highest = *bins;
    for (int i = 1; i < reg_max; ++i) {
        highest = std::max(highest, bins[static_cast<std::size_t>(i) * step]);
    }
    float total = 0.0F;
    float mean = 0.0F;
    for (int i = 0; i < reg_max; ++i) {
        const float weight = std::exp(bins[static_cast<std::size_t>(i) * step] - highest);
        total += weight;
        mean += weight * static_cast<float>(i);
    }
    return mean / total;
}

// The box of one anchor, in px of the input; score and label are the caller's.
Detection box_of(const Level& level, std::size_t anchor, int reg_max) {
    const std::size_t side = level.box_step * static_cast<std::size_t>(reg_max);
    const float* bins = level.boxes + anchor;
    const auto width = static_cast<std::size_t>(level.width);
    const float x = static_cast<float>(anchor % width) + 0.5F;
    const float y = static_cast<float>(anchor / width) + 0.5F;
    const auto stride = static_cast<float>(level.stride);
    Detection result;
    result.x1 = (x - distance(bins, level.box_step, reg_max)) * stride;
    result.y1 = (y - distance(bins + side, level.box_step, reg_max)) * stride;
    result.x2 = (x + distance(bins + 2 * side, level.box_step, reg_max)) * stride;
    result.y2 = (y + distance(bins + 3 * side, level.box_step, reg_max)) * stride;
    return result;
}

struct Candidate {
    const Level* level;
    std::size_t anchor;
    float score;
    int label;
};

bool better(const Candidate& a, const Candidate& b) {
    return a.score > b.score;
}

// The anchors whose best class is above the confidence, best first.
std::vector<Candidate> candidates(const std::vector<Level>& levels, const HeadSettings& settings) {
    const float lowest = lowest_logit(settings.confidence);
    std::vector<Candidate> result;
    std::vector<float> best;
    std::vector<int> label;
    for (const Level& level : levels) {
        const std::size_t anchors = static_cast<std::size_t>(level.width) * static_cast<std::size_t>(level.height);
        best.assign(level.scores, level.scores + anchors);
        label.assign(anchors, 0);
        for (int c = 1; c < settings.classes; ++c) {
            const float* logits = level.scores + static_cast<std::size_t>(c) * level.score_step;
            for (std::size_t i = 0; i < anchors; ++i) {
                if (logits[i] > best[i]) {
                    best[i] = logits[i];
                    label[i] = c;
                }
            }
        }
        for (std::size_t i = 0; i < anchors; ++i) {
            if (best[i] > lowest && sigmoid(best[i]) > settings.confidence) {
                result.push_back({&level, i, sigmoid(best[i]), label[i]});
            }
        }
    }
    std::stable_sort(result.begin(), result.end(), better);
    return result;
}

std::vector<Detection> boxes_of(const std::vector<Candidate>& found, int reg_max) {
    std::vector<Detection> result;
    result.reserve(found.size());
    for (const Candidate& candidate : found) {
        result.push_back(box_of(*candidate.level, candidate.anchor, reg_max));
        result.back().score = candidate.score;
        result.back().label = candidate.label;
    }
    return result;
}

float overlap(const Detection& a, const Detection& b) {
    const float width = std::min(a.x2, b.x2) - std::max(a.x1, b.x1);
    const float height = std::min(a.y2, b.y2) - std::max(a.y1, b.y1);
    if (width <= 0.0F || height <= 0.0F) {
        return 0.0F;
    }
    const float both = width * height;
    return both / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - both);
}

std::vector<Detection> suppress(const std::vector<Detection>& sorted, float iou, std::size_t at_most) {
    std::vector<Detection> kept;
    for (const Detection& candidate : sorted) {
        const bool hidden = std::any_of(kept.begin(), kept.end(), [&](const Detection& other) {
            return other.label == candidate.label && overlap(other, candidate) > iou;
        });
        if (!hidden) {
            kept.push_back(candidate);
            if (kept.size() == at_most) {
                break;
            }
        }
    }
    return kept;
}

// An end-to-end head names every class of its best anchors, and keeps the best of those pairs.
std::vector<Candidate> all_classes(const std::vector<Candidate>& anchors, const HeadSettings& settings) {
    const float lowest = lowest_logit(settings.confidence);
    std::vector<Candidate> result;
    for (const Candidate& anchor : anchors) {
        for (int c = 0; c < settings.classes; ++c) {
            const float logit = anchor.level->scores[static_cast<std::size_t>(c) * anchor.level->score_step + anchor.anchor];
            if (logit > lowest && sigmoid(logit) > settings.confidence) {
                result.push_back({anchor.level, anchor.anchor, sigmoid(logit), c});
            }
        }
    }
    std::stable_sort(result.begin(), result.end(), better);
    return result;
}

}  // namespace

bool is_finite(const std::vector<Level>& levels) {
    const auto holds = [](float value) { return std::isfinite(value); };
    return std::all_of(levels.begin(), levels.end(), [&](const Level& level) {
        const std::size_t anchors = static_cast<std::size_t>(level.width) * static_cast<std::size_t>(level.height);
        return std::all_of(level.boxes, level.boxes + anchors, holds) &&
               std::all_of(level.scores, level.scores + anchors, holds);
    });
}

std::vector<Detection> decode(const std::vector<Level>& levels, const HeadSettings& settings) {
    auto most = static_cast<std::size_t>(settings.max_detections);
    std::vector<Candidate> found = candidates(levels, settings);
    if (!settings.end2end) {
        found.resize(std::min(found.size(), MAX_CANDIDATES));
        return suppress(boxes_of(found, settings.reg_max), settings.iou, most);
    }
    std::size_t anchors = 0;
    for (const Level& level : levels) {
        anchors += static_cast<std::size_t>(level.width) * static_cast<std::size_t>(level.height);
    }
    most = std::min(most, anchors);
    found.resize(std::min(found.size(), most));
    found = all_classes(found, settings);
    found.resize(std::min(found.size(), most));
    return boxes_of(found, settings.reg_max);
}

void to_image(std::vector<Detection>& detections, const Placement& placement, int image_width, int image_height) {
    const auto left = static_cast<float>(placement.left);
    const auto top = static_cast<float>(placement.top);
    const auto gain_x = static_cast<float>(placement.gain_x);
    const auto gain_y = static_cast<float>(placement.gain_y);
    const auto width = static_cast<float>(image_width);
    const auto height = static_cast<float>(image_height);
    for (Detection& box : detections) {
        box.x1 = std::clamp((box.x1 - left) / gain_x, 0.0F, width);
        box.y1 = std::clamp((box.y1 - top) / gain_y, 0.0F, height);
        box.x2 = std::clamp((box.x2 - left) / gain_x, 0.0F, width);
        box.y2 = std::clamp((box.y2 - top) / gain_y, 0.0F, height);
    }
}

}  // namespace espalier
