package org.espalier.detector

import android.content.Context
import android.graphics.RectF
import java.io.File
import java.nio.ByteBuffer

/** An object in an upright image; [box] in its pixels. */
data class Detection(val box: RectF, val score: Float, val name: String)

/** The model of the bundle on the CPU. Not for several threads at once. */
class Detector(context: Context, threads: Int) : AutoCloseable {
    private val labels: List<String>
    private var handle: Long

    init {
        // ncnn reads files; assets are none.
        val folder = File(context.filesDir, "model").apply { mkdirs() }
        for (name in FILES) {
            context.assets.open(name).use { asset ->
                File(folder, name).outputStream().use { file -> asset.copyTo(file) }
            }
        }
        labels = File(folder, LABELS).readLines()
        handle = nativeOpen(folder.path, threads)
    }

    /**
     * Detects in one frame, best object first.
     *
     * @param rgba direct buffer, 4 bytes a pixel, rows [rowBytes] apart
     * @param rotation degrees, clockwise, by which the frame must be turned to stand upright
     */
    fun detect(rgba: ByteBuffer, width: Int, height: Int, rowBytes: Int, rotation: Int): List<Detection> {
        check(handle != 0L) { "the detector is closed" }
        val values = nativeDetect(handle, rgba, width, height, rowBytes, rotation)
        return values.indices.step(VALUES_OF_A_BOX).map { i ->
            Detection(
                RectF(values[i], values[i + 1], values[i + 2], values[i + 3]),
                values[i + 4],
                labels[values[i + 5].toInt()],
            )
        }
    }

    override fun close() {
        nativeClose(handle)
        handle = 0
    }

    private external fun nativeOpen(folder: String, threads: Int): Long

    private external fun nativeDetect(
        handle: Long,
        rgba: ByteBuffer,
        width: Int,
        height: Int,
        rowBytes: Int,
        rotation: Int,
    ): FloatArray

    private external fun nativeClose(handle: Long)

    private companion object {
        const val LABELS = "labels.txt"
        const val VALUES_OF_A_BOX = 6
        val FILES = listOf("detector.txt", LABELS, "model.ncnn.param", "model.ncnn.bin")

        init {
            System.loadLibrary("espalier_detector_jni")
        }
    }
}
