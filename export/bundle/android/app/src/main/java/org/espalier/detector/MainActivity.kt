package org.espalier.detector

import android.Manifest
import android.os.Bundle
import android.os.SystemClock
import android.view.WindowManager
import android.widget.FrameLayout
import android.widget.Toast
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts
import androidx.camera.core.CameraSelector
import androidx.camera.core.ImageAnalysis
import androidx.camera.core.ImageProxy
import androidx.camera.core.Preview
import androidx.camera.core.resolutionselector.AspectRatioStrategy
import androidx.camera.core.resolutionselector.ResolutionSelector
import androidx.camera.lifecycle.ProcessCameraProvider
import androidx.camera.view.PreviewView
import androidx.core.content.ContextCompat
import java.util.concurrent.Executors

/** The camera's picture with the boxes of the model on it. */
class MainActivity : ComponentActivity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var preview: PreviewView
    private lateinit var boxes: BoxesView
    private lateinit var detector: Detector

    private val askForCamera = registerForActivityResult(ActivityResultContracts.RequestPermission()) { granted ->
        if (granted) startCamera() else Toast.makeText(this, R.string.camera_needed, Toast.LENGTH_LONG).show()
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        preview = PreviewView(this).apply { scaleType = PreviewView.ScaleType.FIT_CENTER }
        boxes = BoxesView(this)
        setContentView(
            FrameLayout(this).apply {
                addView(preview)
                addView(boxes)
            },
        )
        detector = Detector(this, THREADS)
        askForCamera.launch(Manifest.permission.CAMERA)
    }

    override fun onDestroy() {
        super.onDestroy()
        // After the frame that the worker may still be looking at.
        if (::detector.isInitialized) worker.execute { detector.close() }
        worker.shutdown()
    }

    private fun startCamera() {
        val future = ProcessCameraProvider.getInstance(this)
        // A turn of the phone may have ended this activity meanwhile, and another one waits for the camera too.
        future.addListener({ if (!isDestroyed) bind(future.get()) }, ContextCompat.getMainExecutor(this))
    }

    private fun bind(provider: ProcessCameraProvider) {
        // The same shape for both, so that boxes lie where the preview shows their objects.
        val shape = ResolutionSelector.Builder()
            .setAspectRatioStrategy(AspectRatioStrategy.RATIO_4_3_FALLBACK_AUTO_STRATEGY)
            .build()
        val picture = Preview.Builder().setResolutionSelector(shape).build()
        picture.setSurfaceProvider(preview.surfaceProvider)
        val frames = ImageAnalysis.Builder()
            .setResolutionSelector(shape)
            .setOutputImageFormat(ImageAnalysis.OUTPUT_IMAGE_FORMAT_RGBA_8888)
            .setBackpressureStrategy(ImageAnalysis.STRATEGY_KEEP_ONLY_LATEST)
            .build()
        frames.setAnalyzer(worker) { frame -> frame.use { detect(it) } }
        provider.unbindAll()
        val back = CameraSelector.DEFAULT_BACK_CAMERA
        val camera = if (provider.hasCamera(back)) back else CameraSelector.DEFAULT_FRONT_CAMERA
        provider.bindToLifecycle(this, camera, picture, frames)
    }

    private fun detect(frame: ImageProxy) {
        val plane = frame.planes[0]
        val rotation = frame.imageInfo.rotationDegrees
        val start = SystemClock.elapsedRealtimeNanos()
        val found = detector.detect(plane.buffer, frame.width, frame.height, plane.rowStride, rotation)
        val latencyMs = (SystemClock.elapsedRealtimeNanos() - start) / 1e6
        val turned = rotation % 180 != 0
        val width = if (turned) frame.height else frame.width
        val height = if (turned) frame.width else frame.height
        val status = getString(R.string.latency, found.size, latencyMs)
        runOnUiThread { boxes.show(found, width, height, status) }
    }

    private companion object {
        const val THREADS = 4
    }
}
