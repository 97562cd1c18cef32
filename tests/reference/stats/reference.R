# Reads the CSV of this folder, runs R's own functions, writes reference.json. `Rscript reference.R` in this folder.
# No random number enters but the resampling of coin's max-T, whose seed and number of draws are stored with it.
suppressPackageStartupMessages({
  library(jsonlite); library(MASS); library(survival); library(lme4); library(lmerTest); library(pROC)
  library(coin); library(sandwich); library(clubSandwich); library(metafor); library(pscl); library(ordinal)
  library(splines)
})
options(digits = 17, contrasts = c("contr.treatment", "contr.poly"))
read <- function(name) read.csv(paste0(name, ".csv"), stringsAsFactors = TRUE)
num <- function(x) unname(as.numeric(x))
named <- function(x) as.list(setNames(as.numeric(x), names(x)))
each <- function(names, f) setNames(lapply(names, f), names)
out <- list()

pat <- read("patients"); coh <- read("cohort"); few <- read("few"); zi <- read("zero_inflated")
d1 <- read("d1"); d2 <- read("d2"); d3 <- read("d3"); d7 <- read("d7"); studies <- read("studies")
pv <- read("p_values")$p
coh$age10 <- (coh$age - 55) / 10
latents <- grep("^z_", names(pat), value = TRUE)
pat$case <- as.integer(pat$arm == "b")
coh$edge <- as.integer(coh$region == "edge")  # the second class in sorted order

# ---- correlation ----------------------------------------------------------------------------------------------
correlation <- function(x, y) {
  p <- cor.test(x, y); s <- suppressWarnings(cor.test(x, y, method = "spearman", exact = FALSE))
  k <- suppressWarnings(cor.test(x, y, method = "kendall", exact = FALSE))
  list(pearson = num(p$estimate), pearson_t = num(p$statistic), pearson_p = p$p.value, pearson_ci = num(p$conf.int),
       spearman = num(s$estimate), spearman_p = s$p.value, kendall = num(k$estimate), kendall_z = num(k$statistic),
       kendall_p = k$p.value)
}
out$correlation <- each(latents, function(z) correlation(pat[[z]], pat$score))
out$correlation_d1 <- correlation(d1$x, d1$y)
out$correlation_exact <- each(paste0("z_", 0:3), function(z) list(
  spearman = num(cor(few[[z]], few$value, method = "spearman")),
  spearman_p = cor.test(few[[z]], few$value, method = "spearman", exact = TRUE)$p.value,
  kendall = num(cor(few[[z]], few$value, method = "kendall")),
  kendall_p = cor.test(few[[z]], few$value, method = "kendall", exact = TRUE)$p.value))

# ---- two groups -----------------------------------------------------------------------------------------------
two <- function(x, case, site = NULL) {
  arm <- factor(case, levels = c(1, 0))
  w <- wilcox.test(x[case == 1], x[case == 0], correct = FALSE, exact = FALSE)
  wt <- coin::wilcox_test(x ~ arm)
  n1 <- sum(case == 1); n0 <- sum(case == 0)
  roc <- roc(case, x, direction = "<", quiet = TRUE)
  fired <- factor(x != 0, levels = c(TRUE, FALSE)); f <- table(fired, arm)
  t <- t.test(x[case == 1], x[case == 0])
  sp <- sqrt(((n1 - 1) * var(x[case == 1]) + (n0 - 1) * var(x[case == 0])) / (n1 + n0 - 2))
  d <- (mean(x[case == 1]) - mean(x[case == 0])) / sp
  h <- sqrt(1 / n1 + 1 / n0); df <- n1 + n0 - 2
  nct <- function(p) uniroot(function(m) pt(d / h, df, m) - p, c(-12, 12), tol = 1e-14)$root
  correction <- 1 - 3 / (4 * (n1 + n0) - 9)
  found <- list(w = num(w$statistic), wilcoxon_p = w$p.value, wilcoxon_z = num(statistic(wt)), coin_p = num(pvalue(wt)),
    auc = num(auc(roc)), delong = num(var(roc, method = "delong")), auc_ci = num(ci.auc(roc))[c(1, 3)],
    welch_t = num(t$statistic), welch_df = num(t$parameter), welch_p = t$p.value,
    hedges_g = d * correction, hedges_ci = c(nct(0.975), nct(0.025)) * h * correction)
  if (!is.null(site)) found <- c(found, stratified_z = num(statistic(coin::wilcox_test(x ~ arm | site))),
    stratified_p = num(pvalue(coin::wilcox_test(x ~ arm | site))))
  if (length(unique(x != 0)) == 2) {
    e <- fisher.test(f); cells <- as.numeric(f) + 0.5 * any(f == 0)
    se <- sqrt(sum(1 / cells)); l <- log(cells[1] * cells[4] / cells[2] / cells[3])
    a <- f[1, 1]; k <- sum(f[1, ]); support <- max(0, k - n0):min(k, n1); pr <- dhyper(support, n1, n0, k)
    own <- dhyper(a, n1, n0, k)
    tie <- abs(pr - own) <= 1e-7 * own
    found <- c(found, list(table = as.integer(f), fisher_p = e$p.value, conditional_or = num(e$estimate),
      exact_ci = num(e$conf.int), or = exp(l), or_ci = exp(l + c(-1, 1) * qnorm(0.975) * se),
      mid_p = sum(pr[pr < own & !tie]) + 0.5 * sum(pr[tie]),
      mid_p_one = list(upper = sum(pr[support > a]) + 0.5 * own, lower = sum(pr[support < a]) + 0.5 * own)))
  }
  found
}
out$two_groups <- each(latents, function(z) two(pat[[z]], pat$case, pat$site))
# Strata: sum of (n_s - 1) r_s, and van Elteren's ranks / (n_s + 1), both through coin by transforming within blocks.
within <- function(x, block, f) { for (b in levels(block)) x[block == b] <- f(x[block == b]); x }
weighted <- function(x, fx, fy) {
  data <- data.frame(x = within(x, pat$site, fx), case = within(as.numeric(pat$case), pat$site, fy), site = pat$site)
  t <- independence_test(x ~ case | site, data)
  list(z = num(statistic(t)), p = num(pvalue(t)))
}
unit <- function(v) (v - mean(v)) / sd(v)
out$stratified <- each(latents, function(z) list(
  rank = weighted(pat[[z]], function(v) unit(rank(v)), unit),
  value = weighted(pat[[z]], unit, unit),
  van_elteren = weighted(pat[[z]], function(v) rank(v) / (length(v) + 1), identity)))
out$two_groups_d1 <- two(d1$x, as.integer(d1$y >= 2))
paired <- function(a, b) {
  r <- roc.test(roc(pat$case, pat[[a]], direction = "<", quiet = TRUE),
                roc(pat$case, pat[[b]], direction = "<", quiet = TRUE), method = "delong", paired = TRUE)
  list(a = a, b = b, z = num(r$statistic), p = num(r$p.value), auc = num(r$estimate),
       covariance = num(cov(roc(pat$case, pat[[a]], direction = "<", quiet = TRUE),
                            roc(pat$case, pat[[b]], direction = "<", quiet = TRUE), method = "delong")))
}
out$paired_delong <- list(paired("z_sparse", "z_dense"), paired("z_tied", "z_halves"), paired("z_rare", "z_signed"))
out$exact <- each(paste0("z_", 0:3), function(z) {
  arm <- factor(few$y, levels = c(1, 0)); x <- few[[z]]
  w <- wilcox.test(x[few$y == 1], x[few$y == 0], exact = TRUE)
  list(w = num(w$statistic), p = w$p.value, coin_p = num(pvalue(coin::wilcox_test(x ~ arm, distribution = "exact"))))
})
out$exact_tied <- list(coin_p = num(pvalue(coin::wilcox_test(few$z_tied ~ factor(few$y, levels = c(1, 0)),
                                                            distribution = "exact"))),
                       permutation_p = num(pvalue(coin::oneway_test(few$z_tied ~ factor(few$y, levels = c(1, 0)),
                                                                    distribution = "exact"))))
tables <- list(spec = c(12, 3, 5, 20), zero = c(12, 0, 5, 20), small = c(3, 1, 1, 3), wide = c(7, 2, 30, 44))
out$tables <- lapply(tables, function(cells) {
  f <- matrix(cells, 2, byrow = TRUE); e <- fisher.test(f)
  n1 <- sum(f[, 1]); n0 <- sum(f[, 2]); k <- sum(f[1, ]); a <- f[1, 1]
  support <- max(0, k - n0):min(k, n1); pr <- dhyper(support, n1, n0, k); own <- dhyper(a, n1, n0, k)
  tie <- abs(pr - own) <= 1e-7 * own
  # bounds of the odds ratio: the noncentral hypergeometric tail, with `own` times the observed value, is alpha/2;
  # fisher.test finds the same bounds and the conditional estimate to 1e-4
  weight <- function(l) { w <- log(pr) + support * l; w <- exp(w - max(w)); w / sum(w) }
  root <- function(g) exp(uniroot(g, c(-25, 25), tol = 1e-14)$root)
  bounds <- function(own) c(
    if (a > min(support)) root(function(l) { w <- weight(l); sum(w[support > a]) + own * w[support == a] - 0.025 }) else 0,
    if (a < max(support)) root(function(l) { w <- weight(l); sum(w[support < a]) + own * w[support == a] - 0.025 }) else Inf)
  list(cells = cells, p = e$p.value, conditional_or = num(e$estimate), exact_ci = num(e$conf.int),
       mid_p = sum(pr[pr < own & !tie]) + 0.5 * sum(pr[tie]), mid_ci = bounds(0.5), fine_ci = bounds(1),
       fine_or = if (a == max(support)) Inf else if (a == min(support)) 0 else
         root(function(l) sum(weight(l) * support) - a))
})

# ---- several groups -------------------------------------------------------------------------------------------
several <- function(x, g) {
  k <- kruskal.test(x, g); a <- anova(lm(x ~ g)); n <- length(x); ss <- a[["Sum Sq"]]; ms <- a[["Mean Sq"]]
  list(h = num(k$statistic), p = k$p.value, coin = num(statistic(coin::kruskal_test(x ~ g))),
       rank_eta2 = num(k$statistic) / (n - 1), f = a[["F value"]][1], f_p = a[["Pr(>F)"]][1],
       eta2 = ss[1] / sum(ss), omega2 = (ss[1] - a$Df[1] * ms[2]) / (sum(ss) + ms[2]),
       epsilon2 = (ss[1] - a$Df[1] * ms[2]) / sum(ss))
}
out$several_groups <- each(latents, function(z) several(pat[[z]], pat$site))
out$several_groups_d3 <- several(d3$value, d3$group)
# Dunn's z by its formula with the tie correction, from R's ranks
dunn <- function(x, g) {
  r <- rank(x); n <- length(x); ties <- table(x); v <- n * (n + 1) / 12 - sum(ties^3 - ties) / (12 * (n - 1))
  pairs <- combn(levels(g), 2)
  z <- apply(pairs, 2, function(q) (mean(r[g == q[1]]) - mean(r[g == q[2]])) /
               sqrt(v * (1 / sum(g == q[1]) + 1 / sum(g == q[2]))))
  p <- 2 * pnorm(-abs(z))
  list(first = pairs[1, ], second = pairs[2, ], z = z, p = p, holm = p.adjust(p, "holm"))
}
out$dunn <- each(latents, function(z) dunn(pat[[z]], pat$site))

# ---- max-T: every arrangement, and coin ------------------------------------------------------------------------
zs <- as.matrix(few[, c(paste0("z_", 0:3), "z_tied")])
arrangements <- combn(14, 6)
statistic_of <- function(values) {
  s <- scale(values, scale = FALSE); s <- sweep(s, 2, sqrt(colSums(s^2)), "/")
  abs(apply(arrangements, 2, function(i) colSums(s[i, , drop = FALSE])))
}
own_column <- which(colSums(arrangements != which(few$y == 1)) == 0)
max_t <- function(values) {
  T <- statistic_of(values); obs <- T[, own_column] - 1e-9; m <- length(obs)  # equal ones differ by rounding
  single <- sapply(obs, function(t) mean(apply(T, 2, max) >= t))
  order <- order(-obs); step <- numeric(m); last <- 0
  for (i in seq_len(m)) {
    rest <- order[i:m]
    last <- max(last, mean(apply(T[rest, , drop = FALSE], 2, max) >= obs[order[i]])); step[order[i]] <- last
  }
  list(raw = rowMeans(T >= obs), single_step = single, step_down = step)
}
out$max_t <- list(columns = colnames(zs), values = max_t(zs), ranks = max_t(apply(zs, 2, rank)))
set.seed(5); draws <- 200000
it <- independence_test(z_sparse + z_tied + z_signed + z_rare + z_dense + z_halves ~ factor(case), data = pat,
  ytrafo = function(data) trafo(data, numeric_trafo = rank_trafo), distribution = approximate(nresample = draws))
out$max_t_coin <- list(draws = draws, z = named(setNames(abs(num(statistic(it, "standardized"))), latents)),
  single_step = named(setNames(num(pvalue(it, "single-step")), latents)),
  step_down = named(setNames(num(pvalue(it, "step-down")), latents)))

# ---- linear models --------------------------------------------------------------------------------------------
linear <- function(z) {
  pat$z <- pat[[z]]; m <- lm(score ~ age + site + sex + z, pat); s <- summary(m)$coefficients["z", ]
  rx <- resid(lm(z ~ age + site + sex, pat)); ry <- resid(lm(score ~ age + site + sex, pat))
  ranked <- data.frame(z = rank(pat$z), score = rank(pat$score), age = rank(pat$age), site = pat$site, sex = pat$sex)
  dummies <- model.matrix(~ site + sex, pat)[, -1]
  cr <- apply(cbind(rank(pat$age), apply(dummies, 2, rank)), 2, identity)
  qx <- resid(lm(rank(pat$z) ~ cr)); qy <- resid(lm(rank(pat$score) ~ cr))
  list(slope = num(s[1]), se = num(s[2]), t = num(s[3]), p = num(s[4]), ci = num(confint(m)["z", ]),
       partial = cor(rx, ry), semi_partial_latent = cor(rx, pat$score), semi_partial_target = cor(pat$z, ry),
       partial_spearman = cor(qx, qy),
       loglik = num(logLik(m)), aic = AIC(m), r2 = summary(m)$r.squared)
}
out$linear <- each(latents, linear)
d2lm <- lm(y ~ x, d2)
out$d2 <- list(raw = cor(d2$x, d2$y), partial = cor(resid(lm(x ~ c, d2)), resid(lm(y ~ c, d2))),
  slope = num(coef(d2lm)[2]), se = summary(d2lm)$coefficients[2, 2],
  cr0 = sqrt(vcovCL(d2lm, d2$g, type = "HC0", cadjust = FALSE)[2, 2]),
  cr1 = sqrt(vcovCL(d2lm, d2$g, type = "HC1", cadjust = TRUE)[2, 2]),
  cr2 = sqrt(vcovCR(d2lm, d2$g, type = "CR2")[2, 2]),
  cr2_df = coef_test(d2lm, vcovCR(d2lm, d2$g, type = "CR2"))$df_Satt[2])
ns4 <- ns(pat$age, df = 4)
out$spline <- c(list(df = 4, knots = num(attr(ns4, "knots")), boundary = num(attr(ns4, "Boundary.knots")),
  fitted = num(fitted(lm(score ~ ns4, pat)))),
  list(latents = each(latents, function(z) {
    m <- lm(pat$score ~ ns4 + pat[[z]]); s <- summary(m)$coefficients; s <- s[nrow(s), ]
    list(slope = num(s[1]), se = num(s[2]), t = num(s[3]), p = num(s[4]))
  })), list(knots3 = num(attr(ns(pat$age, df = 3), "knots")), fitted3 = num(fitted(lm(score ~ ns(age, df = 3), pat)))))

clustered <- function(m, g) {
  v <- function(type, adjust) sqrt(diag(vcovCL(m, g, type = type, cadjust = adjust)))
  last <- length(coef(m))
  one <- function(type) {
    V <- vcovCR(m, cluster = g, type = type); t <- coef_test(m, vcov = V, test = "Satterthwaite")
    list(se = num(sqrt(diag(V))), df = num(t$df_Satt), p = num(t$p_Satt))
  }
  found <- list()
  if (inherits(m, "glm")) {  # clubSandwich on the least squares that the last step is
    root <- sqrt(m$family$variance(fitted(m)))
    step <- data.frame(y = root * m$linear.predictors + resid(m, "response") / root, X = I(root * model.matrix(m)))
    if (!is.null(m$offset)) step$y <- step$y - root * m$offset
    white <- lm(y ~ 0 + X, step); V <- vcovCR(white, cluster = g, type = "CR2")
    t <- coef_test(white, vcov = V, test = "Satterthwaite")
    found$cr2_step <- list(se = num(sqrt(diag(V))), df = num(t$df_Satt), p = num(t$p_Satt))
  }
  c(found, coef = list(num(coef(m))), list(se = num(summary(m)$coefficients[, 2]), cr0 = num(v("HC0", FALSE)),
       cr0_g = num(v("HC0", TRUE)), cr1 = num(v("HC1", TRUE)), cr1s = one("CR1S"), cr2 = one("CR2")))
}
out$cluster_lm <- each(latents, function(z) { coh$z <- coh[[z]]; clustered(lm(score ~ age + scanner + z, coh), coh$patient) })
# the errors that glm gives are of its last step but one: a second call starts where the first ended
settled <- function(formula, family, data) {
  control <- glm.control(epsilon = 1e-14, maxit = 100)
  first <- glm(formula, family, data, control = control)
  glm(formula, family, data, control = control, start = coef(first))
}
out$cluster_logistic <- each(latents[c(1, 3, 5)], function(z) {
  coh$z <- coh[[z]]; clustered(settled(edge ~ age + z, binomial, coh), coh$patient) })
out$cluster_poisson <- each(latents[c(1, 3, 5)], function(z) {
  coh$z <- coh[[z]]
  clustered(settled(count ~ age + z + offset(log(area)), poisson, coh), coh$patient) })

# ---- mixed models ---------------------------------------------------------------------------------------------
tight <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-10, maxfun = 1e5))
mixed <- function(formula) {
  m <- lmerTest::lmer(formula, coh, REML = TRUE, control = tight); s <- coef(summary(m))
  ml <- lme4::lmer(formula, coh, REML = FALSE, control = tight)
  null <- lme4::lmer(update(formula, . ~ . - z), coh, REML = FALSE, control = tight)
  vc <- as.data.frame(VarCorr(m)); vml <- as.data.frame(VarCorr(ml))
  list(coef = num(s[, "Estimate"]), se = num(s[, "Std. Error"]), df = num(s[, "df"]), t = num(s[, "t value"]),
       p = num(s[, "Pr(>|t|)"]), groups = vc$grp, variance = vc$vcov, variance_ml = vml$vcov,
       reml = num(logLik(m)), ml = num(logLik(ml)), coef_ml = num(fixef(ml)),
       lr = num(2 * (logLik(ml) - logLik(null))), lr_p = pchisq(num(2 * (logLik(ml) - logLik(null))), 1, lower = FALSE))
}
out$lmer <- each(latents, function(z) { coh$z <<- coh[[z]]; mixed(score ~ age + z + (1 | patient)) })
out$lmer_nested <- each(latents, function(z) { coh$z <<- coh[[z]]; mixed(score ~ age + z + (1 | patient / slide)) })
glmm <- function(formula, family, q, offset = NULL) {
  control <- glmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5), tolPwrss = 1e-12)
  m <- glmer(formula, coh, family, nAGQ = q, control = control)
  s <- coef(summary(m))
  list(coef = num(s[, 1]), se = num(s[, 2]), sd = num(sqrt(VarCorr(m)$patient)), deviance = num(-2 * logLik(m)),
       loglik = num(logLik(m)))
}
glmm_latents <- latents[c(1, 2, 5)]
for (q in c(1, 25)) {
  out[[paste0("glmer_binomial_", q)]] <- each(glmm_latents, function(z) {
    coh$z <<- coh[[z]]; glmm(edge ~ age10 + z + (1 | patient), binomial, q) })
  out[[paste0("glmer_poisson_", q)]] <- each(glmm_latents, function(z) {
    coh$z <<- coh[[z]]; glmm(count ~ age10 + z + offset(log(area)) + (1 | patient), poisson, q) })
}

# ---- counts ---------------------------------------------------------------------------------------------------
out$poisson <- each(latents, function(z) {
  pat$z <- pat[[z]]
  m <- settled(count ~ age + z + offset(log(area)), poisson, pat); s <- coef(summary(m))
  null <- settled(count ~ age + offset(log(area)), poisson, pat)
  list(coef = num(s[, 1]), se = num(s[, 2]), loglik = num(logLik(m)), aic = AIC(m), deviance = deviance(m),
       pearson = sum(resid(m, "pearson")^2) / m$df.residual, score = num(anova(null, m, test = "Rao")[2, "Rao"]))
})
out$negbin <- each(latents, function(z) {
  pat$z <- pat[[z]]
  m <- glm.nb(count ~ age + z + offset(log(area)), pat, control = glm.control(epsilon = 1e-12, maxit = 500))
  s <- coef(summary(m))
  se <- attr(theta.ml(m$y, fitted(m), limit = 200, eps = 1e-14), "SE")  # glm.nb's own is of its last step but one
  list(coef = num(s[, 1]), se = num(s[, 2]), theta = m$theta, se_theta = num(se), loglik = num(logLik(m)))
})
zero <- function(dist, y) {
  zi$y <- zi[[y]]
  m <- zeroinfl(y ~ w + x + offset(log(area)) | 1, zi, dist = dist, EM = FALSE,
                control = zeroinfl.control(reltol = 1e-15, maxit = 20000))
  list(coef = num(m$coefficients$count), zero = num(m$coefficients$zero), theta = if (is.null(m$theta)) NULL else m$theta,
       se = num(sqrt(diag(vcov(m)))), loglik = num(logLik(m)))
}
out$zip <- zero("poisson", "zip"); out$zinb <- zero("negbin", "zinb")
out$logistic <- each(latents, function(z) {
  pat$z <- pat[[z]]; m <- settled(case ~ age + z, binomial, pat); s <- coef(summary(m))
  list(coef = num(s[, 1]), se = num(s[, 2]), loglik = num(logLik(m)))
})

# ---- ordinal --------------------------------------------------------------------------------------------------
# Score test that z has one coefficient at all thresholds, expected information, from clm's fit (no package has it)
proportional <- function(c, y, age, z) {
  theta <- c$alpha; T <- length(theta); n <- length(y); size <- 2 * T + 1
  D <- array(0, c(n, T + 2, size)); P <- matrix(0, n, T + 2); P[, T + 2] <- 1
  for (k in 1:T) {
    eta <- theta[k] - c$beta[["age"]] * age - c$beta[["z"]] * z; f <- dlogis(eta); P[, k + 1] <- plogis(eta)
    D[, k + 1, k] <- f; D[, k + 1, T + k] <- -f * z; D[, k + 1, size] <- -f * age
  }
  P <- P[, -1] - P[, -(T + 2)]; D <- D[, -1, ] - D[, -(T + 2), ]
  info <- matrix(0, size, size); gradient <- numeric(size)
  for (i in 1:n) {
    gradient <- gradient + D[i, y[i], ] / P[i, y[i]]
    info <- info + crossprod(D[i, , ] / sqrt(P[i, ]))
  }
  chisq <- num(gradient %*% solve(info, gradient))
  list(chisq = chisq, p = pchisq(chisq, T - 1, lower = FALSE))
}
out$ordinal <- each(latents, function(z) {
  pat$z <- pat[[z]]; pat$g <- factor(pat$grade, ordered = TRUE)
  p <- polr(g ~ age + z, pat, Hess = TRUE, control = list(reltol = 1e-15, maxit = 1000))
  c <- clm(g ~ age + z, data = pat, control = clm.control(gradTol = 1e-12)); null <- clm(g ~ age, data = pat)
  list(polr = num(coef(p)), polr_zeta = num(p$zeta), polr_loglik = num(logLik(p)), polr_se = num(sqrt(diag(vcov(p)))),
       zeta = num(c$alpha), coef = num(c$beta), se = num(sqrt(diag(vcov(c)))), loglik = num(logLik(c)),
       lr = num(2 * (logLik(c) - logLik(null))),
       proportional = proportional(c, as.integer(pat$g), pat$age, pat$z),
       aic = AIC(c))
})
out$cluster_ordinal <- each(latents[c(1, 3, 5)], function(z) {
  pat$z <- pat[[z]]; pat$g <- factor(pat$grade, ordered = TRUE)
  p <- polr(g ~ age + z, pat, Hess = TRUE, control = list(reltol = 1e-15, maxit = 1000))
  half <- rowsum(estfun(p), pat$site) %*% vcov(clm(g ~ age + z, data = pat, control = clm.control(gradTol = 1e-12)))[
    c("age", "z", "0|1", "1|2", "2|3"), c("age", "z", "0|1", "1|2", "2|3")]
  list(cr0 = num(sqrt(diag(crossprod(half))))[1:2])
})

# ---- survival -------------------------------------------------------------------------------------------------
fine <- coxph.control(eps = 1e-13, iter.max = 100, toler.chol = 1e-14)
cox <- function(formula, data, ties = "efron", cluster = NULL, zph = TRUE) {
  environment(formula) <- environment()
  m <- if (is.null(cluster)) coxph(formula, data, ties = ties, control = fine) else
    coxph(formula, data, ties = ties, cluster = cluster, control = fine)
  s <- summary(m)
  found <- list(coef = num(coef(m)), se = num(s$coefficients[, "se(coef)"]), loglik = m$loglik, score = num(s$sctest[1]),
    lr = num(s$logtest[1]), wald = num(m$wald.test), concordance = num(m$concordance["concordance"]),
    concordance_se = num(m$concordance["std"]))
  if (!is.null(cluster)) found$robust_se <- num(s$coefficients[, "robust se"])
  if (zph) for (t in c("km", "identity", "rank")) {
    z <- cox.zph(m, transform = t, terms = FALSE)$table
    found[[paste0("zph_", t)]] <- list(chisq = num(z[, "chisq"]), p = num(z[, "p"]))
  }
  found
}
out$cox <- each(latents, function(z) {
  pat$z <- pat[[z]]; pat$site2 <- pat$site
  list(efron = cox(Surv(time, event) ~ age + z, pat), breslow = cox(Surv(time, event) ~ age + z, pat, "breslow"),
       strata = cox(Surv(time, event) ~ age + z + strata(site), pat),
       cluster = cox(Surv(time, event) ~ age + z, pat, cluster = pat$site, zph = FALSE),
       alone = cox(Surv(time, event) ~ z, pat),
       concordance = num(concordance(Surv(time, event) ~ z, pat, reverse = TRUE)$concordance),
       concordance_se = num(sqrt(concordance(Surv(time, event) ~ z, pat, reverse = TRUE)$var)),
       uno = num(concordance(Surv(time, event) ~ z, pat, reverse = TRUE, timewt = "n/G2")$concordance))
})
# score test of z given age: at the coefficients without z
out$cox_score <- each(latents, function(z) {
  pat$z <- pat[[z]]; null <- coxph(Surv(time, event) ~ age, pat, control = fine)
  m <- coxph(Surv(time, event) ~ age + z, pat, init = c(coef(null), 0), control = coxph.control(iter.max = 0))
  list(chisq = num(m$score), alone = num(coxph(Surv(time, event) ~ z, pat, control = fine)$score))
})
# one unit left out at a time, spread about the full estimate
jackknife <- function(f) {
  full <- f(pat); each <- sapply(seq_len(nrow(pat)), function(i) f(pat[-i, ]))
  sqrt((nrow(pat) - 1) / nrow(pat) * sum((each - full)^2))
}
out$jackknife <- list(
  cox = jackknife(function(d) num(coef(coxph(Surv(time, event) ~ age + z_dense, d, control = fine))["z_dense"])))
km <- survfit(Surv(time, event) ~ 1, pat, conf.type = "log-log")
pat$cause <- ifelse(pat$event == 1, ifelse(pat$sex == "f", 1, 2), 0)
aj <- survfit(Surv(time, factor(cause)) ~ 1, pat)
out$kaplan_meier <- list(time = km$time, survival = km$surv, se = km$std.err * km$surv, low = km$lower, high = km$upper,
  n_risk = km$n.risk, n_event = km$n.event)
out$aalen_johansen <- list(time = aj$time, first = aj$pstate[, 2], second = aj$pstate[, 3], se_first = aj$std.err[, 2])
out$cox_d7 <- list(
  untied = cox(Surv(time, event) ~ z, d7), efron = cox(Surv(tied, event) ~ z, d7),
  breslow = cox(Surv(tied, event) ~ z, d7, "breslow"))

# ---- meta-analysis --------------------------------------------------------------------------------------------
meta <- function(y, v, method, test = "z") {
  m <- rma(y, v, method = method, test = test, control = list(threshold = 1e-14, maxiter = 10000, tol = 1e-14))
  p <- predict(m)
  list(estimate = num(m$beta), se = m$se, ci = c(m$ci.lb, m$ci.ub), p = m$pval, q = m$QE, q_p = m$QEp, tau2 = m$tau2,
       i2 = m$I2, h2 = m$H2, prediction = num(c(p$pi.lb, p$pi.ub)))
}
out$meta <- lapply(list(varied = studies$yi, alike = studies$alike), function(y) {
  found <- list(FE = meta(y, studies$vi, "FE"))
  for (m in c("DL", "REML", "PM")) {
    found[[m]] <- meta(y, studies$vi, m); found[[paste0(m, "_knha")]] <- meta(y, studies$vi, m, "knha")
  }
  found
})

# strata of one study: Fisher's z of each site, logit of each site's AUROC with DeLong's variance
sites <- levels(pat$site)
pooled_by <- function(y, v, method) {
  m <- rma(y, v, method = method, control = list(threshold = 1e-14, maxiter = 10000))
  list(estimate = num(m$beta), ci = c(m$ci.lb, m$ci.ub), q = m$QE, q_p = m$QEp, tau2 = m$tau2, i2 = m$I2)
}
out$strata <- each(latents, function(z) {
  parts <- split(pat, pat$site)
  r <- sapply(parts, function(d) cor(d[[z]], d$score)); n <- sapply(parts, nrow)
  a <- sapply(parts, function(d) num(auc(roc(d$case, d[[z]], direction = "<", quiet = TRUE))))
  v <- sapply(parts, function(d) num(var(roc(d$case, d[[z]], direction = "<", quiet = TRUE), method = "delong")))
  list(fixed = pooled_by(atanh(r), 1 / (n - 3), "FE"), random = pooled_by(atanh(r), 1 / (n - 3), "DL"),
       auroc = pooled_by(qlogis(a), v / (a * (1 - a))^2, "DL"))
})

# ---- multiplicity, power --------------------------------------------------------------------------------------
out$adjust <- each(c("BH", "BY", "holm", "bonferroni"), function(m) p.adjust(pv, m))
out$power <- list(
  pearson_n = ((qnorm(0.975) + qnorm(0.8)) / atanh(0.3))^2 + 3,
  pearson_n_family = ((qnorm(1 - 0.05 / 2 / 10000) + qnorm(0.8)) / atanh(0.3))^2 + 3,
  pearson_r = tanh((qnorm(0.975) + qnorm(0.8)) / sqrt(40 - 3)),
  kruskal = { load <- uniroot(function(x) pchisq(qchisq(0.95, 2), 2, x, lower.tail = FALSE) - 0.8, c(1e-6, 1e3), tol = 1e-14)$root
    load / (load + 120) })

# ---- patients from tiles --------------------------------------------------------------------------------------
pooled <- aggregate(coh[, c(latents, "score")], list(patient = coh$patient), mean)
firing <- aggregate(coh[, latents] != 0, list(patient = coh$patient), mean)
most <- aggregate(coh[, latents], list(patient = coh$patient), max)
out$pooled <- each(latents, function(z) list(
  mean = cor(pooled[[z]], pooled$score), mean_spearman = cor(pooled[[z]], pooled$score, method = "spearman"),
  firing = if (sd(firing[[z]]) > 0) cor(firing[[z]], pooled$score) else NULL, max = cor(most[[z]], pooled$score)))
out$intraclass <- {
  a <- anova(lm(score ~ patient, coh)); n <- table(coh$patient); n0 <- (sum(n) - sum(n^2) / sum(n)) / (length(n) - 1)
  list(msb = a[["Mean Sq"]][1], msw = a[["Mean Sq"]][2], n0 = n0,
       icc = (a[["Mean Sq"]][1] - a[["Mean Sq"]][2]) / (a[["Mean Sq"]][1] + (n0 - 1) * a[["Mean Sq"]][2]))
}

packages <- c("lme4", "lmerTest", "pROC", "coin", "survival", "sandwich", "clubSandwich", "MASS", "metafor", "pscl",
              "ordinal", "splines", "jsonlite")
out$versions <- c(list(R = as.character(getRversion())), each(packages, function(p) as.character(packageVersion(p))))
writeLines(toJSON(out, digits = I(17), auto_unbox = TRUE, pretty = 1, null = "null", na = "string"), "reference.json")
