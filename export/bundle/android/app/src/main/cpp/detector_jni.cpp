// What Detector.kt calls: a handle stands for an open detector.

#include <jni.h>

#include <string>
#include <vector>

#include "detector.h"

namespace {

using espalier::Detector;

constexpr int VALUES_OF_A_BOX = 6;  // x1, y1, x2, y2, score, class
constexpr int RGBA_BYTES = 4;

void fail(JNIEnv* env, const char* exception, const std::string& message) {
    env->ThrowNew(env->FindClass(exception), message.c_str());
}

Detector* of(jlong handle) {
    return reinterpret_cast<Detector*>(handle);
}

}  // namespace

extern "C" JNIEXPORT jlong JNICALL Java_org_espalier_detector_Detector_nativeOpen(JNIEnv* env, jobject /*self*/,
                                                                                  jstring folder, jint threads) {
    const char* path = env->GetStringUTFChars(folder, nullptr);
    if (path == nullptr) {
        return 0;
    }
    auto* detector = new Detector();
    const std::string error = detector->open(path, threads);
    env->ReleaseStringUTFChars(folder, path);
    if (!error.empty()) {
        delete detector;
        fail(env, "java/io/IOException", error);
        return 0;
    }
    return reinterpret_cast<jlong>(detector);
}

extern "C" JNIEXPORT jfloatArray JNICALL Java_org_espalier_detector_Detector_nativeDetect(
    JNIEnv* env, jobject /*self*/, jlong handle, jobject rgba, jint width, jint height, jint row_bytes, jint rotation) {
    const auto* pixels = static_cast<const std::uint8_t*>(env->GetDirectBufferAddress(rgba));
    const jlong size = env->GetDirectBufferCapacity(rgba);
    // The last row may end with its last pixel.
    const bool fits = width > 0 && height > 0 && row_bytes >= RGBA_BYTES * static_cast<jlong>(width) &&
                      size >= (height - 1) * static_cast<jlong>(row_bytes) + RGBA_BYTES * static_cast<jlong>(width);
    if (pixels == nullptr || !fits) {
        fail(env, "java/lang/IllegalArgumentException", "the frame is not a direct buffer of RGBA pixels of this size");
        return nullptr;
    }
    const espalier::PixelView frame{pixels, width, height, static_cast<std::size_t>(row_bytes), RGBA_BYTES};
    const int orientation = espalier::orientation_of_rotation(rotation);
    std::vector<espalier::Detection> boxes;
    espalier::Timing timing;
    std::string error;
    if (orientation == 1) {
        error = of(handle)->detect(frame, boxes, timing);
    } else {
        const espalier::Image turned = espalier::upright(frame, orientation);
        error = of(handle)->detect(turned.view(), boxes, timing);
    }
    if (!error.empty()) {
        fail(env, "java/lang/IllegalStateException", error);
        return nullptr;
    }

    std::vector<jfloat> values;
    values.reserve(boxes.size() * VALUES_OF_A_BOX);
    for (const espalier::Detection& box : boxes) {
        values.insert(values.end(), {box.x1, box.y1, box.x2, box.y2, box.score, static_cast<jfloat>(box.label)});
    }
    const auto count = static_cast<jsize>(values.size());
    jfloatArray result = env->NewFloatArray(count);
    if (result != nullptr) {
        env->SetFloatArrayRegion(result, 0, count, values.data());
    }
    return result;
}

extern "C" JNIEXPORT void JNICALL Java_org_espalier_detector_Detector_nativeClose(JNIEnv* /*env*/, jobject /*self*/,
                                                                                  jlong handle) {
    delete of(handle);
}
