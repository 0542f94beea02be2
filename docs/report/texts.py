"""The words of the report: what each section shows, the equation that it rests on, and where that is in the code."""

from collections.abc import Sequence
from dataclasses import dataclass

P1, P2, P3 = "Problem 1: digits", "Problem 2: faces", "Problem 3: Stable Diffusion"


@dataclass(frozen=True)
class Text:
    """The words of one section.

    Attributes:
        problem: heading that it stands under.
        title: its own.
        edition: of the course.
        paragraphs: HTML.
        equations: TeX as matplotlib knows it, without dollars.
        source: of the equations: paper, number, and function here.
    """

    problem: str
    title: str
    edition: str
    paragraphs: Sequence[str]
    equations: Sequence[str]
    source: str


TEXTS = {
    "p1-2025": Text(
        P1,
        "Ten digits from ten noises",
        "Fall 2025",
        [
            "Even digits are MNIST-M's, odd ones SVHN's. A row is a digit; its ten images start from ten noises, keyed"
            " by seed, class and number, and should differ in stroke, colour and background. The column at the right,"
            " if there is one, has real images that the network was not trained on.",
            "The network predicts v from the noised image, the timestep and one label out of twenty joint classes"
            " (domain, digit); the table tells what a judge, trained on real images alone, reads in the graded"
            " images.",
        ],
        [
            r"x_t=\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\,\epsilon",
            r"v=\sqrt{\bar\alpha_t}\,\epsilon-\sqrt{1-\bar\alpha_t}\,x_0",
        ],
        "Ho et al. 2020, equation 4; Salimans and Ho 2022, section 2.4. NoiseSchedule.add_noise and .target in"
        " common/schedule.py",
    ),
    "p1-2024": Text(
        P1,
        "All ten digits of each domain",
        "Fall 2024",
        [
            "The same network, asked for the other half of its classes too: whether MNIST-M or SVHN is drawn is a"
            " matter of the label alone, since both domains share all weights and one table of classes.",
        ],
        [
            r"h=\mathrm{GroupNorm}(x)\,(1+s(e))+b(e),\qquad e=\mathrm{time}(t)+\mathrm{context}(\mathrm{label})",
        ],
        "Dhariwal and Nichol 2021, appendix A. ResidualBlock in p1_ddpm/model.py",
    ),
    "p1-process": Text(
        P1,
        "The reverse process of the first 0 and the first 1",
        "both editions",
        [
            "Six moments on the way from noise to image. Under each noised image stands the x<sub>0</sub> that the"
            " network predicts from it: at first an average of all that the label allows, then more and more one"
            " digit. What is large is settled early, edges late.",
            "The graded images take few steps of DPM-Solver++; here many small DDIM steps lead to much the same"
            " image from the same noise.",
        ],
        [
            r"x_{t'}=\sqrt{\bar\alpha_{t'}}\,\hat x_0(x_t,t)+\sqrt{1-\bar\alpha_{t'}}\,\hat\epsilon(x_t,t)",
        ],
        "Song et al. 2021, equation 12 with eta 0. ddim_step in common/sampling.py",
    ),
    "p1-guidance": Text(
        P1,
        "What guidance does",
        "beyond the course",
        [
            "From the same noise, with more guidance in each row. Without it the digit is often unclear; with more"
            " the class becomes sharper, contrast and saturation rise, and the images become more alike.",
        ],
        [
            r"\hat v=v(x_t,\emptyset)+s\,(v(x_t,c)-v(x_t,\emptyset))",
        ],
        "Ho and Salimans 2022, equation 6, with s = w + 1. guided in common/sampling.py",
    ),
    "p2-eta": Text(
        P2,
        "Faces of the noises 00 to 03 by eta",
        "both editions",
        [
            "With eta 0 the way from noise to face is fixed by the noise. The larger eta, the more fresh noise comes"
            " in at every step, and the less the face has to do with where it began; eta 1 is DDPM's variance. With"
            " few steps the fresh noise of a large eta is not all taken out again.",
        ],
        [
            r"\sigma_t(\eta)=\eta\,\sqrt{\dfrac{1-\bar\alpha_{t'}}{1-\bar\alpha_t}}\,\sqrt{1-\dfrac{\bar\alpha_t}{\bar\alpha_{t'}}}",
            r"x_{t'}=\sqrt{\bar\alpha_{t'}}\,\hat x_0+\sqrt{1-\bar\alpha_{t'}-\sigma_t^2}\,\hat\epsilon+\sigma_t z",
        ],
        "Song et al. 2021, equations 12 and 16. ddim_step in common/sampling.py",
    ),
    "p2-between": Text(
        P2,
        "Between two noises: slerp and lerp",
        "both editions",
        [
            "Gaussian noise of D values has length √D, almost exactly, and that is all the network has ever seen."
            " Slerp walks along the sphere and keeps the length. Lerp cuts through it: in the middle the noise is"
            " about a factor √2 too short, and the face is washed out.",
        ],
        [
            r"\mathrm{slerp}(a,b,\alpha)=\dfrac{\sin((1-\alpha)\theta)}{\sin\theta}\,a+\dfrac{\sin(\alpha\theta)}{\sin\theta}\,b",
            r"\mathrm{lerp}(a,b,\alpha)=(1-\alpha)\,a+\alpha\,b",
        ],
        "Shoemake 1985; Song et al. 2021, section 5.3. slerp and lerp in p2_ddim/interpolate.py",
    ),
    "p2-truth": Text(
        P2,
        "The graded faces against the ground truth",
        "both editions",
        [
            "50 DDIM steps with the timesteps 981, 961, ..., 1, the clamped x<sub>0</sub>, the last alpha and the"
            " min-max normalisation of the course's ground truth. What is left between the two is the rounding of"
            " sums on different machines.",
        ],
        [
            r"\mathrm{MSE}=\dfrac{1}{3HW}\sum(\mathrm{drawn}-\mathrm{truth})^2",
        ],
        "p2_ddim/evaluate.py",
    ),
    "p3-two": Text(
        P3,
        "One control image with two circles, two prompts",
        "Fall 2025",
        [
            "The course's hint has one circle in all of training; here it has two. What the course's published"
            " result shows is that both circles are followed but the colours land in the wrong places. The table"
            " tells, for the same prompts and seed, where the discs lie and which named colour each area is nearest"
            " to.",
        ],
        [
            r"y_c=F(x;\Theta)+Z(F(x+Z(c;\Theta_{z1});\Theta_c);\Theta_{z2})",
        ],
        "Zhang et al. 2023, equation 2: Z are the zero convolutions. ControlNet in p3_controlnet/model.py",
    ),
    "p3-sides": Text(
        P3,
        "Control, output and target",
        "Fall 2025",
        [
            "Held-out pairs of colours. The outline decides where, the prompt which colours. The table is over all"
            " examples; its score is the course's formula with the CLIP at hand, which for the shipped weights is the"
            " miniature's own, so it does not compare with scores by ViT-B/32.",
        ],
        [
            r"\mathcal{L}=\mathbb{E}\,\Vert\epsilon-\epsilon_\theta(x_t,t,c_{\mathrm{prompt}},c_{\mathrm{hint}})\Vert^2",
            r"\mathrm{score}=\mathrm{IoU}\cdot\dfrac{\cos+1}{2}",
        ],
        "Zhang et al. 2023, equation 10; the course's score. control_loss in p3_controlnet/train.py, course_score in"
        " p3_controlnet/evaluate.py",
    ),
    "p3-strength": Text(
        P3,
        "The strength of the control",
        "beyond the course",
        [
            "The residuals that the ControlNet adds, multiplied by a number. At 0 the frozen model draws what the"
            " prompt says, wherever it likes; at 1 the hint decides; beyond, edges harden and colours suffer.",
        ],
        [
            r"h_i\leftarrow h_i+s\,r_i(x_t,t,c)",
        ],
        "add_residuals in p3_controlnet/unet.py",
    ),
    "p3-2024-zeroshot": Text(
        P3,
        "CLIP without training: successes and failures",
        "Fall 2024",
        [
            "A picture is named after the sentence whose vector lies nearest to its own. Five that this gets right"
            " and five that it gets wrong, each with the five likeliest classes and their probabilities.",
            "Without the course's pictures and a CLIP ViT-B/32, the miniature's CLIP names drawn circles by colour:"
            " another task, whose figures do not compare with those published for the course's.",
        ],
        [
            r"\hat y=\mathrm{argmax}_k\;\cos(f(\mathrm{picture}),\,g(\mathrm{sentence}_k))",
        ],
        "Radford et al. 2021, section 3.1. class_scores in p3_personalization/zeroshot.py",
    ),
    "p3-2024-words": Text(
        P3,
        "What words are learned from, and what they draw",
        "Fall 2024",
        [
            "Textual inversion learns one new row of the text encoder's table and leaves everything else as it was."
            " Above are the pictures of a concept, beneath what each method draws for its first prompt.",
        ],
        [
            r"v_*=\mathrm{argmin}_v\;\mathbb{E}\,\Vert\epsilon-\epsilon_\theta(z_t,t,c(v))\Vert^2",
        ],
        "Gal et al. 2022, equation 2. p3_personalization/textual_inversion.py",
    ),
    "p3-2024-both": Text(
        P3,
        "Two concepts in one picture",
        "Fall 2024",
        [
            "The words of two concepts in one prompt, from the same noise: learned apart by textual inversion, and"
            " together by Custom Diffusion, which also trains the matrices that make keys and values of the prompt."
            " Published results show one of the two concepts alone, or both fused.",
        ],
        [
            r"\mathrm{Attention}=\mathrm{softmax}(Q K^T/\sqrt{d})\,V,\qquad K=W_k\,c,\quad V=W_v\,c",
        ],
        "Kumari et al. 2023, section 3.2: of the U-Net, W_k and W_v of the cross-attention alone are trained."
        " p3_personalization/custom_diffusion.py",
    ),
}
