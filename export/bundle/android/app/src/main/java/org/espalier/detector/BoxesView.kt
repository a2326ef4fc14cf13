package org.espalier.detector

import android.content.Context
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.Paint
import android.view.View
import java.util.Locale
import kotlin.math.min

/** Draws boxes over a preview that shows the whole image in its middle. */
class BoxesView(context: Context) : View(context) {
    private var detections = emptyList<Detection>()
    private var imageWidth = 1
    private var imageHeight = 1
    private var status = ""

    private val density = resources.displayMetrics.density
    private val line = Paint().apply {
        color = Color.GREEN
        style = Paint.Style.STROKE
        strokeWidth = 2 * density
    }
    private val text = Paint(Paint.ANTI_ALIAS_FLAG).apply {
        color = Color.GREEN
        textSize = 14 * density
        setShadowLayer(2 * density, 0f, 0f, Color.BLACK)
    }

    /** Shows the detections of an upright image of that size, and a line of text. */
    fun show(found: List<Detection>, width: Int, height: Int, message: String) {
        detections = found
        imageWidth = width
        imageHeight = height
        status = message
        invalidate()
    }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        val scale = min(width / imageWidth.toFloat(), height / imageHeight.toFloat())
        val left = (width - imageWidth * scale) / 2
        val top = (height - imageHeight * scale) / 2
        for ((box, score, name) in detections) {
            val x = left + box.left * scale
            val y = top + box.top * scale
            canvas.drawRect(x, y, left + box.right * scale, top + box.bottom * scale, line)
            canvas.drawText(String.format(Locale.ROOT, "%s %.2f", name, score), x, y - 3 * density, text)
        }
        canvas.drawText(status, 8 * density, height - 24 * density, text)
    }
}
