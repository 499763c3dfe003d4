# Formula for a private tap, see deploy/README.md. Builds the checkout at $HOMEBREW_GLMD_SOURCE.
class Glmd < Formula
  desc "Server for GLM-4.7-Flash on Apple silicon"
  license "Apache-2.0"
  head "file://#{ENV.fetch("HOMEBREW_GLMD_SOURCE", "/nonexistent")}", using: :git, branch: "main"

  depends_on arch: :arm64
  depends_on :macos
  depends_on "python@3.13"

  def install
    # Wheels instead of resources: MLX has a wheel for each macOS version, built against its Metal.
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", "--disable-pip-version-check", buildpath
    bin.install_symlink libexec/"bin/glmd"
  end

  # Settings, including the model, are read from ~/.config/glmd/config.toml.
  service do
    run [opt_bin/"glmd", "serve"]
    keep_alive successful_exit: false
    process_type :interactive
    throttle_interval 30
    log_path var/"log/glmd.log"
    error_log_path var/"log/glmd.log"
    environment_variables GLMD_LOG_FILE: var/"log/glmd.log"
  end

  test do
    assert_match "serve", shell_output("#{bin}/glmd --help")
  end
end
