// As much of the Java Native Interface as detector_jni.cpp uses, so that it can be compiled, not linked, without a JDK.
#pragma once

#include <cstdint>

#define JNIEXPORT
#define JNICALL

using jint = std::int32_t;
using jlong = std::int64_t;
using jfloat = float;
using jsize = jint;
using jboolean = unsigned char;

class _jobject {};
class _jclass : public _jobject {};
class _jstring : public _jobject {};
class _jfloatArray : public _jobject {};
using jobject = _jobject*;
using jclass = _jclass*;
using jstring = _jstring*;
using jfloatArray = _jfloatArray*;

struct JNIEnv {
    jclass FindClass(const char* name);
    jint ThrowNew(jclass exception, const char* message);
    const char* GetStringUTFChars(jstring text, jboolean* is_copy);
    void ReleaseStringUTFChars(jstring text, const char* characters);
    void* GetDirectBufferAddress(jobject buffer);
    jlong GetDirectBufferCapacity(jobject buffer);
    jfloatArray NewFloatArray(jsize count);
    void SetFloatArrayRegion(jfloatArray array, jsize start, jsize count, const jfloat* values);
};
